"""The same bits eagerly, compiled, fused and mapped."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimized import OPTIONS

from jaxcompress._src.quantization.fake_quant import fake_quantize_array
from jaxcompress._src.quantization.round_to_nearest import quantize_array
from jaxcompress._src.quantization.scales import block_scales
from jaxcompress.quantization import QuantSpec
from jaxcompress.trace import LeafLayout

IN_OUT = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
STACKED = LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,))
VARIANTS = ({"convention": "narrow"}, {"convention": "full"}, {"symmetric": False})


def weights(shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32).astype(dtype)


def _equal_bits(x, y):
    x, y = np.asarray(x), np.asarray(y)
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8))


@pytest.mark.parametrize(("shape", "dtype"), [((12, 5), jnp.float32), ((12, 5), jnp.bfloat16), ((1, 1), jnp.float32)])
def test_jit_equals_eager_bit_for_bit(shape, dtype):
    """Also alone on the axis, where XLA could cancel a division by a quotient."""
    specs = [QuantSpec(bits=5, scale_dtype=s, **v) for s, v in itertools.product(("float32", "bfloat16"), VARIANTS)]
    specs += [QuantSpec(bits=1), QuantSpec(bits=4, group_size=max(shape[0] // 3, 1))]
    specs += [QuantSpec(bits=8, per_tensor=True, symmetric=False)]
    w = weights((64, *shape), dtype)

    def all_specs(w):
        return [(fake_quantize_array(w, s, IN_OUT), block_scales(w, s, IN_OUT)) for s in specs]

    compiled = jax.jit(all_specs, compiler_options=OPTIONS)
    for one in w[:8]:
        with jax.disable_jit():
            wanted = all_specs(one)
        for x, y in zip(jax.tree.leaves(compiled(one)), jax.tree.leaves(wanted), strict=True):
            _equal_bits(x, y)


def test_quotients_are_rounded_once():
    """A reciprocal would move a tenth of these; its codes would depend on what XLA fuses."""
    w = np.random.default_rng(0).normal(size=(512, 64)).astype(np.float32)
    scale, _ = jax.jit(lambda w: block_scales(w, QuantSpec(bits=8), IN_OUT), compiler_options=OPTIONS)(w)
    np.testing.assert_array_equal(scale, np.abs(w).max(0, keepdims=True) / np.float32(127))
    leaf = quantize_array(jnp.asarray(w), QuantSpec(bits=8), IN_OUT)
    np.testing.assert_array_equal(leaf.codes(), np.round(w / np.asarray(scale)))


@pytest.mark.parametrize("spec", [QuantSpec(bits=4, group_size=4, symmetric=False), QuantSpec(bits=1)])
def test_vmap_over_stacked_equals_the_stacked_layout(spec):
    w = weights((4, 12, 5))

    @functools.partial(jax.jit, compiler_options=OPTIONS)
    @jax.vmap
    def mapped(x):
        leaf = quantize_array(x, spec, IN_OUT)
        return fake_quantize_array(x, spec, IN_OUT), leaf, leaf.materialize()

    fake, leaf, plain = mapped(w)
    whole = quantize_array(w, spec, STACKED).materialize()
    for values in (fake, plain, leaf.materialize() if spec.bits > 1 else whole):
        _equal_bits(values, whole)
