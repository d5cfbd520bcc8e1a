from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress._src.arrays.packed import pack
from jaxcompress._src.quantization.inputs import InputRounding
from jaxcompress.arrays import (
    AdditiveCodebookArray,
    CodebookArray,
    InputQuantizedArray,
    LowRankArray,
    QuantizedArray,
    sparsify,
)
from jaxcompress.quantization import QuantSpec


def _bits(leaf: Any) -> bytes:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return _bits(jax.random.key_data(leaf))
    array = np.asarray(leaf)
    # An int beyond 64 bits would be an array of pointers.
    return str(leaf).encode() if array.dtype == object else array.tobytes()


def _assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for new, old in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        kind = jax.Array if isinstance(old, jax.Array) else np.ndarray if isinstance(old, np.ndarray) else type(old)
        assert isinstance(new, kind), (type(new), kind)
        assert np.shape(new) == np.shape(old)
        assert getattr(new, "dtype", None) == getattr(old, "dtype", None)
        assert _bits(new) == _bits(old)


@pytest.fixture
def assert_same() -> Callable[[Any, Any], None]:
    """Equal structure (static fields too), equal classes, shapes, dtypes and bits."""
    return _assert_same


def _compressed() -> dict[str, Any]:
    """One leaf for each way to compress, logically (16, 8), in unlike shapes of parts."""
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
    codes = jnp.round(weights).astype(jnp.int8)
    mask, half = jnp.abs(weights) > 0.5, jnp.arange(16)[:, None] % 4 < jnp.full((1, 8), 2)
    scale, groups = jnp.full((1, 8), 0.25, jnp.float32), jnp.full((4, 8), 0.25, jnp.bfloat16)
    packed = pack(codes, bits=4, axis=0)
    kept, regular = sparsify(codes, mask), sparsify(codes, half, pattern=(2, 4), axis=0)

    def quantized(data: Any, scale: Any, **fields: Any) -> QuantizedArray:
        return QuantizedArray(data=data, scale=scale, dtype=jnp.dtype("float32"), **fields)

    nested = sparsify(codes, half, pattern=(2, 4), axis=0)
    nested = type(nested)(**{**vars(nested), "values": pack(nested.values, bits=4, axis=0)})
    left, right = weights[:, None, :2], weights.T[None, :, :2]
    thin = LowRankArray(left=left, right=right, dtype=jnp.dtype("float32"))
    half_codes = quantized(pack(codes[:, None, :2], bits=4, axis=0), scale[:, None, :1])
    with_rest = LowRankArray(left=half_codes, right=right, residual=quantized(packed, groups), dtype=thin.dtype)
    return {
        "packed": packed,
        "int8": quantized(codes, scale),
        "int4 groups": quantized(packed, groups),
        "zero point": quantized(pack(jnp.abs(codes).astype(jnp.uint8), bits=3, axis=0), scale, zero_point=scale + 1),
        "levels": quantized(pack(jnp.abs(codes).astype(jnp.uint8), bits=4, axis=1), scale, levels=(0.1,) * 16),
        "codebook": CodebookArray(
            data=pack(jnp.abs(codes).astype(jnp.uint8), bits=3, axis=0),
            table=jnp.linspace(-1, 1, 7)[None, None],
            dtype=jnp.dtype("float32"),
            zero=True,
        ),
        "additive codebooks": AdditiveCodebookArray(
            data=pack(jnp.abs(codes[::4, :, None]).astype(jnp.uint8) % 3, bits=2, axis=1),
            table=jnp.linspace(-1, 1, 12, dtype=jnp.bfloat16).reshape(1, 1, 1, 3, 4),
            dtype=jnp.dtype("float32"),
            scale=scale.astype(jnp.bfloat16),
            axis=-2,
            width=16,
        ),
        "bit mask": sparsify(weights.astype(jnp.bfloat16), mask),
        "bit mask in shards": sparsify(weights, mask, shards=4),
        "2:4": sparsify(weights, half, pattern=(2, 4), axis=0),
        "int8 bit mask": quantized(kept, scale),
        "int8 2:4": quantized(regular, groups),
        "int4 2:4": quantized(nested, groups),
        "quantized inputs": InputQuantizedArray(
            weight=quantized(packed, groups),
            inputs=InputRounding(spec=QuantSpec(bits=8, symmetric=False)),
            scale=jnp.float32(0.1),
            zero_point=jnp.uint8(3),
        ),
        "low rank": thin,
        "low rank with a residual": with_rest,
        "stacked": jax.tree.map(lambda part: jnp.stack([part, part]), quantized(packed, groups)),
    }


@pytest.fixture(scope="session")
def compressed() -> dict[str, Any]:
    return _compressed()
