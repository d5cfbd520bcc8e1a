"""Learned steps: values and derivatives against NumPy in float64, and the transform `lsq`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress._src.arrays.validate import validate_array
from jaxcompress._src.quantization.blocks import scale_shape
from jaxcompress._src.quantization.learned import learned_quantize_array
from jaxcompress.arrays import sparsify
from jaxcompress.quantization import QuantSpec, lsq
from jaxcompress.trace import LeafLayout

KEY = jax.random.key(0)
LAYOUT = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
SPECS = {
    "2 bits": QuantSpec(bits=2, convention="full"),
    "3 bits, groups": QuantSpec(bits=3, group_size=4),
    "2 bits, zero points": QuantSpec(bits=2, group_size=6, symmetric=False),
    "4 bits, tiles": QuantSpec(bits=4, group_size=6, group_outputs=5, symmetric=False),
    "1 bit": QuantSpec(bits=1),
    "NF4": QuantSpec(format="nf4", group_size=4),
    "FP4": QuantSpec(format="fp4_e2m1"),
    "ternary": QuantSpec(format="ternary"),
    "bfloat16 scales": QuantSpec(bits=3, group_size=4, scale_dtype="bfloat16"),
}


def weights(shape=(12, 5), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def spread(parameter, shape):
    out = np.asarray(parameter, np.float64)
    for axis, size in enumerate(shape):
        out = np.repeat(out, size // out.shape[axis], axis)
    return out


def steps(spec, shape=(12, 5)):
    """Scales that clip some weights, and zero points that are no whole numbers."""
    rng = np.random.default_rng(1)
    blocks = scale_shape(shape, spec, LAYOUT)
    scale = rng.uniform(0.3, 0.6, blocks).astype(np.float32)
    if spec.levels is not None:
        scale *= np.float32(2 / max(spec.levels))
    zero = rng.uniform(0.6, 2.4, blocks).astype(np.float32) if not spec.symmetric else None
    return scale, np.full((1, 1), 0.5, np.float32) if spec.bits == 1 else zero


def reference(w, scale, zero, spec, cotangent):
    """(values, dL/dw, dL/dscale, dL/dzero), one weight after another."""
    blocks = scale.shape
    stored = np.asarray(jnp.asarray(scale, spec.scale_dtype), np.float64)
    highest = spec.code_range[1] if spec.levels is None else 2 ** (spec.bits - 1) - 1
    factor = 1 / np.sqrt(w.size / scale.size * max(highest, 1))
    wide = spread(stored, w.shape)
    whole = 0.5 if spec.bits == 1 else 0.0 if zero is None else np.round(spread(zero, w.shape))
    ratio = w.astype(np.float64) / wide
    if spec.levels is not None:
        table = np.asarray(spec.levels)
        units = table[np.abs(ratio[..., None] - table).argmin(-1)]
        inside = (ratio > table.min()) & (ratio < table.max())
    else:
        low, high = spec.code_range
        codes = (w >= 0) if spec.bits == 1 else np.clip(np.round(ratio) + whole, low, high)
        units = codes - whole
        inside = (ratio + whole > low) & (ratio + whole < high)
    slope = factor * np.where(inside, units - ratio, units)
    shift = factor * np.where(inside, 0, -wide)
    parts = []
    for part in (slope * cotangent, shift * cotangent):
        split = part.reshape([n for pair in zip(blocks, np.array(w.shape) // blocks, strict=True) for n in pair])
        parts.append(split.sum((1, 3)))
    return units * wide, np.where(inside, cotangent, 0), *parts


@pytest.mark.parametrize("name", SPECS)
def test_values_and_derivatives(name):
    spec, w = SPECS[name], weights()
    (scale, zero), cotangent = steps(spec), weights(seed=2)

    def loss(w, scale, zero):
        return (learned_quantize_array(w, scale, zero, spec) * cotangent).sum()

    rounded = jax.jit(functools.partial(learned_quantize_array, spec=spec))(w, scale, zero)
    learns_zero = zero is not None and spec.bits > 1
    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2) if learns_zero else (0, 1)))(w, scale, zero)
    values, *wanted = reference(w, scale, zero, spec, cotangent)
    np.testing.assert_allclose(rounded, values, rtol=1e-6)
    for grad, expected in zip(found, wanted, strict=False):
        np.testing.assert_allclose(grad, expected, rtol=2e-5, atol=2e-6)


def test_pact_learns_from_what_it_clips_alone():
    spec = QuantSpec(bits=4, symmetric=False, per_tensor=True)
    x = jnp.array([[-1.0, 0.26, 1.4, 1.5, 3.0, 7.0]])
    alpha, zero = jnp.full((1, 1), 1.5), jnp.zeros((1, 1))

    def clipped(x, alpha):
        return learned_quantize_array(x, alpha / 15, zero, spec, gradient="pact")

    np.testing.assert_allclose(clipped(x, alpha), [[0, 0.3, 1.4, 1.5, 1.5, 1.5]], rtol=1e-6)
    by_x, by_alpha = jax.grad(lambda x, a: clipped(x, a).sum(), argnums=(0, 1))(x, alpha)
    np.testing.assert_array_equal(by_x, [[0, 1, 1, 0, 0, 0]])
    np.testing.assert_allclose(by_alpha, [[3.0]], rtol=1e-6)


def tree():
    second = jnp.asarray(weights((12, 5))).at[3, 2].set(0.0)
    return {"first": {"kernel": jnp.asarray(weights((24, 5)), jnp.bfloat16), "bias": jnp.zeros(6)}, "second": second}


@pytest.mark.parametrize("name", SPECS)
def test_what_is_trained_is_what_is_stored(name):
    """After steps that move every scale and zero point."""
    transform = lsq(SPECS[name])
    params, optimizer = tree(), optax.sgd(0.05)
    state = transform.init(params, key=KEY)
    begun = jax.tree.leaves(state.trainable)
    inner = optimizer.init(state.trainable)

    @jax.jit
    def step(params, state, inner):
        def loss(trainable):
            effective = transform.apply(params, state._replace(trainable=trainable))
            far = jax.tree.map(lambda x, w: jnp.square(x - 1.1 * w).astype(jnp.float32).sum(), effective, params)
            return sum(jax.tree.leaves(far))

        updates, inner = optimizer.update(jax.grad(loss)(state.trainable), inner)
        state = state._replace(trainable=optax.apply_updates(state.trainable, updates))
        return (*transform.project(params, state), inner)

    for _ in range(3):
        params, state, inner = step(params, state, inner)
    assert all((old != new).any() for old, new in zip(begun, jax.tree.leaves(state.trainable), strict=True) if old.size)
    effective = jax.jit(transform.apply)(params, state)
    final = transform.finalize(params, state)
    stored = jax.jit(jc.materialize)(final)
    for x, y in zip(jax.tree.leaves(stored), jax.tree.leaves(effective), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))
    assert effective["second"][3, 2] == 0
    validate_array(final["first"]["kernel"])


def test_start_from_the_mean_is_the_paper():
    w = jnp.asarray(weights())
    state = lsq(QuantSpec(bits=3, convention="full"), initial_scales="mean").init({"w": w}, key=KEY)
    wanted = 2 * np.abs(weights().astype(np.float64)).mean(0) / np.sqrt(3)
    np.testing.assert_allclose(state.trainable.scale["w"][0], wanted, rtol=1e-6)
    blank = lsq(QuantSpec(bits=3), initial_scales="mean").init({"w": jnp.zeros((4, 2))}, key=KEY)
    np.testing.assert_array_equal(blank.trainable.scale["w"], np.ones((1, 2)))


def test_pruned_leaves_keep_their_zeros_and_their_index():
    w = jnp.asarray(weights())
    mask = jnp.abs(w) > 0.7
    transform = lsq(QuantSpec(bits=2, symmetric=False))
    params = {"w": jnp.where(mask, w, 0.0)}
    state = transform.init(params, key=KEY)
    state = state._replace(trainable=jax.tree.map(lambda leaf: leaf + 0.3, state.trainable))
    effective = transform.apply(params, state)["w"]
    assert (effective[~mask] == 0).all()
    stored = transform.finalize({"w": sparsify(w, mask)}, state)["w"]
    assert type(stored.data).__name__ == "BitmaskSparseArray"
    np.testing.assert_array_equal(jax.jit(lambda leaf: leaf.materialize())(stored), effective)


def test_a_scale_that_jumps_below_zero_comes_back():
    transform = lsq(QuantSpec(bits=4))
    params = {"w": jnp.asarray(weights())}
    state = transform.init(params, key=KEY)
    state = state._replace(trainable=jax.tree.map(lambda leaf: leaf - 10, state.trainable))
    _, state = transform.project(params, state)
    assert (state.trainable.scale["w"] > 0).all()
    grad = jax.grad(lambda t: jnp.square(transform.apply(params, state._replace(trainable=t))["w"] - params["w"]).sum())
    found = grad(state.trainable).scale["w"]
    assert np.isfinite(found).all()
    assert (found < 0).all()


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="`initial_scales` 'mean' is for symmetric integers"):
        lsq(QuantSpec(bits=4, symmetric=False), initial_scales="mean")
    with pytest.raises(ValueError, match="no scale to learn"):
        lsq(QuantSpec(bits=4, format="fixed_point"))
    with pytest.raises(ValueError, match="'w' holds 1 NaN"):
        lsq(QuantSpec(bits=4)).init({"w": jnp.array([[1.0, jnp.nan]])}, key=KEY)
