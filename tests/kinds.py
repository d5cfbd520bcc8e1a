"""One maker for each kind of compressed leaf: `(array, layout) -> compressed leaf`, with plain arithmetic."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.arrays.packed import pack
from jaxcompress._src.types import is_compressed
from jaxcompress.arrays import AdditiveCodebookArray, CodebookArray, LowRankArray, QuantizedArray, sparsify
from jaxcompress.trace import LeafLayout

Maker = Callable[[jax.Array, LeafLayout], Any]


def _quantized(
    bits: int, *, groups: bool = False, zero_point: bool = False, per_tensor: bool = False, powers: bool = False
) -> Maker:
    def make(array: jax.Array, layout: LeafLayout) -> QuantizedArray:
        axis, shape = layout.input_axes[-1], array.shape
        shared = set(range(array.ndim)) - set(layout.stack_axes) if per_tensor else set(layout.input_axes)
        blocks = [1 if i in shared else n for i, n in enumerate(shape)]
        if groups:
            blocks[axis] = shape[axis] // 4
        split = np.asarray(array).reshape([part for n, s in zip(shape, blocks, strict=True) for part in (s, n // s)])
        inner = tuple(range(1, split.ndim, 2))
        low, high = np.minimum(split.min(inner), 0), np.maximum(split.max(inner), 0)
        zero = None
        scale = np.maximum(high, -low) / max(2 ** (bits - 1) - 1, 1)
        if zero_point:
            scale = (high - low) / (2**bits - 1)
            zero = np.round(-low / scale).astype(np.uint8)
        if powers:
            scale = 2.0 ** np.ceil(np.log2(np.maximum(scale, 1e-30)))
        wide = [part for s in blocks for part in (s, 1)]
        codes = np.round(split / scale.reshape(wide)) + (0 if zero is None else zero.reshape(wide))
        codes = codes.reshape(shape).astype(np.int8 if zero is None else np.uint8)
        if zero is not None:
            zero = pack(zero, bits=bits, axis=layout.output_axes[-1]) if groups else jnp.asarray(zero)
        return _leaf(array, codes, bits, axis, scale, zero_point=zero)

    return make


def _leaf(array: jax.Array, codes: np.ndarray, bits: int, axis: int, scale: np.ndarray, **rest: Any) -> QuantizedArray:
    data = pack(codes, bits=bits, axis=axis)
    return QuantizedArray(data=data, scale=jnp.asarray(scale, jnp.float32), dtype=array.dtype, **rest)


def _one_bit(array: jax.Array, layout: LeafLayout) -> QuantizedArray:
    scale = 2 * np.abs(array).mean(layout.input_axes, keepdims=True)
    codes = (np.asarray(array) > 0).astype(np.uint8)
    half = jnp.full(scale.shape, 0.5)
    return _leaf(array, codes, 1, layout.input_axes[-1], scale, zero_point=half)


def _levels(array: jax.Array, layout: LeafLayout) -> QuantizedArray:
    table = np.linspace(-1, 1, 16) ** 3
    scale = np.abs(array).max(layout.input_axes, keepdims=True)
    codes = np.abs((np.asarray(array) / scale)[..., None] - table).argmin(-1).astype(np.uint8)
    return _leaf(array, codes, 4, layout.input_axes[-1], scale, levels=tuple(map(float, table)))


def _half(array: jax.Array, layout: LeafLayout) -> jax.Array:
    """A mask that keeps two of every four along the innermost input axis."""
    axis = layout.input_axes[-1]
    runs = np.moveaxis(np.abs(array), axis, -1)
    runs = runs.reshape(*runs.shape[:-1], -1, 4)
    kept = np.argsort(np.argsort(-runs, axis=-1), axis=-1) < 2
    return jnp.asarray(np.moveaxis(kept.reshape(*kept.shape[:-2], -1), -1, axis))


def _bitmask(array: jax.Array, layout: LeafLayout) -> Any:
    x = np.abs(np.asarray(array))
    return sparsify(array, jnp.asarray(x > 0.7 * x.mean()), stack_ndim=len(layout.stack_axes))


def _n_of_m(array: jax.Array, layout: LeafLayout) -> Any:
    return sparsify(array, _half(array, layout), pattern=(2, 4), axis=layout.input_axes[-1])


def _sparse_quantized(make_sparse: Maker, make_codes: Maker) -> Maker:
    def make(array: jax.Array, layout: LeafLayout) -> QuantizedArray:
        sparse, dense = make_sparse(array, layout), make_codes(array, layout)
        codes = dense.codes()
        if hasattr(sparse, "pattern"):
            data = sparsify(codes, sparse.mask(), pattern=(2, 4), axis=sparse.axis)
            values = pack(data.values, bits=4, axis=sparse.axis)
        else:
            data = sparsify(codes, sparse.mask(), stack_ndim=len(layout.stack_axes))
            values = pack(data.values, bits=4)
        return dataclasses.replace(dense, data=dataclasses.replace(data, values=values))

    return make


def _codebook(*, zero: bool, per_output: bool = False, sparse: bool = False) -> Maker:
    """Seven or eight values between the extremes of every block; what is small is 0 where there is one."""

    def make(array: jax.Array, layout: LeafLayout) -> CodebookArray:
        own = {*layout.stack_axes, *(layout.output_axes if per_output else ())}
        inner = tuple(axis for axis in range(array.ndim) if axis not in own)
        x = np.asarray(array)
        largest = np.abs(x).max(inner, keepdims=True)
        table = largest[..., None] * np.linspace(-1, 1, 7 if zero else 8) ** 3
        table = np.where(table == 0, largest[..., None] / 50, table)
        codes = np.abs(x[..., None] - table).argmin(-1) + zero
        codes = np.where(np.abs(x) < 0.3 * largest, 0, codes) if zero else codes
        codes = codes.astype(np.uint8)
        data = pack(codes, bits=3, axis=layout.input_axes[-1])
        if sparse:
            kept = sparsify(jnp.asarray(codes), jnp.asarray(codes != 0), stack_ndim=len(layout.stack_axes))
            data = dataclasses.replace(kept, values=pack(kept.values, bits=3))
        return CodebookArray(data=data, table=jnp.asarray(table, jnp.float32), dtype=array.dtype, zero=zero)

    return make


def _additive(array: jax.Array, layout: LeafLayout, *, scaled: bool = False) -> AdditiveCodebookArray:
    """Two tables of 8 runs of 4, other ones for each stacked entry; powers of two, so that every sum is exact."""
    axis, count = layout.input_axes[-1] - array.ndim, 2
    runs = list(array.shape)
    runs[axis] = -(-runs[axis] // 4)
    blocks = [n if i in layout.stack_axes else 1 for i, n in enumerate(array.shape)]
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 8, (*runs, count)).astype(np.uint8)
    table = jnp.asarray(rng.integers(-8, 9, (*blocks, count, 8, 4)) / 16, jnp.float32)
    data, static = pack(codes, bits=4, axis=axis - 1), {"axis": axis, "width": array.shape[axis]}
    if not scaled:
        return AdditiveCodebookArray(data=data, table=table, dtype=array.dtype, **static)
    own = (*layout.stack_axes, *layout.output_axes)
    scale = 2.0 ** rng.integers(-2, 2, [n if i in own else 1 for i, n in enumerate(array.shape)])
    scale = jnp.asarray(scale, jnp.float32)
    return AdditiveCodebookArray(data=data, table=table, scale=scale, dtype=array.dtype, **static)


def _low_rank(make_factor: Maker | None = None, make_residual: Maker | None = None) -> Maker:
    """Factors of sixteenths, and scales that are powers of two: sums are exact in any order."""

    def make(array: jax.Array, layout: LeafLayout) -> LowRankArray:
        rank = 3
        factors = []
        for axes in (layout.input_axes, layout.output_axes):
            kept = [*layout.stack_axes, *axes]
            shape = [n if axis in kept else 1 for axis, n in enumerate(array.shape)]
            values = np.arange(np.prod(shape) * rank).reshape(*shape, rank) * (7 + len(factors)) % 9 - 4
            values = values / 16
            factor = jnp.asarray(values, array.dtype)
            inner = dataclasses.replace(layout, input_axes=tuple(axes), output_axes=(array.ndim,))
            factors.append(factor if make_factor is None else make_factor(factor, inner))
        residual = None if make_residual is None else make_residual(array, layout)
        return LowRankArray(left=factors[0], right=factors[1], residual=residual, dtype=array.dtype)

    return make


def _integers(array: jax.Array, layout: LeafLayout) -> QuantizedArray:
    scale = np.full([n if axis in layout.stack_axes else 1 for axis, n in enumerate(array.shape)], 1 / 16)
    return _leaf(array, np.round(16 * np.asarray(array)).astype(np.int8), 4, layout.input_axes[-1], scale)


def parts_within(leaf: Any) -> Iterator[Any]:
    """A compressed array and those it is made of."""
    if is_compressed(leaf):
        yield leaf
        for part in vars(leaf).values():
            yield from parts_within(part)


KINDS: dict[str, Maker] = {
    "int8 per tensor": _quantized(8, per_tensor=True),
    "int8 per channel": _quantized(8),
    "uint8 zero point": _quantized(8, zero_point=True),
    "int4 groups": _quantized(4, groups=True),
    "uint4 groups zero point": _quantized(4, groups=True, zero_point=True),
    "int3 per channel": _quantized(3),
    "uint5 zero point": _quantized(5, zero_point=True),
    "int2 groups": _quantized(2, groups=True),
    "one bit": _one_bit,
    "levels": _levels,
    "bit mask": _bitmask,
    "2:4": _n_of_m,
    "int4 bit mask": _sparse_quantized(_bitmask, _quantized(4)),
    "int4 2:4 groups": _sparse_quantized(_n_of_m, _quantized(4, groups=True)),
    "uint4 2:4 zero point": _sparse_quantized(_n_of_m, _quantized(4, zero_point=True)),
    "codebook": _codebook(zero=True),
    "codebook per output": _codebook(zero=False, per_output=True),
    "codebook bit mask": _codebook(zero=True, sparse=True),
    "additive codebooks": _additive,
    "additive codebooks scaled": functools.partial(_additive, scaled=True),
    "uint4 bit mask zero point": _sparse_quantized(_bitmask, _quantized(4, zero_point=True)),
    "low rank": _low_rank(),
    "low rank int4": _low_rank(_integers),
    "low rank + int4 groups": _low_rank(make_residual=_quantized(4, groups=True, powers=True)),
    "low rank + bit mask": _low_rank(make_residual=_bitmask),
}
