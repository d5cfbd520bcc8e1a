"""What low-rank leaves become in the program: thin products only, and no large temporary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress._src.execution.execute import fallbacks
from jaxcompress.arrays import LowRankArray


def make(left_shape, right_shape, *, rank=3, dtype="float32"):
    rng = np.random.default_rng(0)
    left, right = (jnp.asarray(rng.normal(size=(*shape, rank)), dtype) for shape in (left_shape, right_shape))
    return LowRankArray(left=left, right=right, dtype=jnp.dtype(dtype))


def close(apply, leaf, *inputs, rtol=1e-5):
    got, wanted = jc.execute(apply)(leaf, *inputs), apply(leaf.materialize(), *inputs)
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    scale = float(jnp.abs(wanted).max(initial=0))
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(wanted, np.float32), rtol=rtol, atol=rtol * scale
    )
    return fallbacks(apply, leaf, *inputs)


X = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5)), jnp.float32)


@pytest.mark.parametrize(
    ("apply", "shapes", "falls"),
    [
        (lambda w, x: x @ w, ((5, 1), (1, 7)), False),
        (lambda w, x: w.T @ x.T, ((5, 1), (1, 7)), False),
        (lambda w, x: x @ w.T, ((7, 1), (1, 5)), False),
        (lambda w, x: jnp.einsum("bi,sio->bso", x, w), ((2, 5, 1), (2, 1, 7)), False),
        (lambda w, x: jnp.einsum("bi,sio->osb", x, w), ((2, 5, 1), (2, 1, 7)), False),
        (lambda w, x: jnp.einsum("bi,sio->sbo", x, w), ((1, 5, 1), (2, 1, 7)), False),
        (lambda w, x: jnp.einsum("bi,bio->bo", x, w), ((4, 5, 1), (1, 1, 7)), False),
        (lambda w, x: jnp.einsum("bi,bio->bo", x, w), ((1, 5, 1), (4, 1, 7)), False),
        (lambda w, x: jnp.einsum("bi,ijo->bjo", x, w), ((5, 3, 1), (1, 1, 7)), False),
        (lambda w, x: jnp.einsum("bi,bio->o", x, w), ((4, 5, 1), (1, 1, 7)), False),
        (lambda w, x: jnp.einsum("bi,bio->o", x, w), ((4, 1, 1), (1, 5, 7)), True),
        (lambda w, x: jnp.einsum("bi,sio->bo", x, w), ((2, 5, 1), (2, 1, 7)), True),
        (lambda w, x: jnp.tensordot(x, w, 0), ((5, 1), (1, 7)), False),
        (lambda w, x: x.reshape(2, 2, 5) @ w.reshape(5, 7), ((5, 1, 1), (1, 1, 7)), False),
        (lambda w, x: x @ w.reshape(5, 14), ((5, 1, 1), (1, 2, 7)), False),
        (lambda w, x: x @ w.reshape(5, 14), ((5, 2, 1), (1, 1, 7)), True),
        (lambda w, x: x @ w[:, 2:6], ((5, 1), (1, 7)), False),
        (lambda w, x: x[:, :3] @ w[1:4], ((5, 1), (1, 7)), False),
    ],
)
def test_any_contraction_is_that_of_the_plain_array(apply, shapes, falls):
    notes = close(apply, make(*shapes), X)
    assert bool(notes) == falls, notes


@pytest.mark.parametrize("sizes", [((0, 1), (1, 7)), ((5, 1), (1, 0)), ((1, 1), (1, 7)), ((5, 1), (1, 1))])
def test_axes_of_size_zero_and_one(sizes):
    leaf = make(*sizes)
    assert close(lambda w, x: x @ w, leaf, jnp.ones((3, leaf.shape[0]))) == ()


def test_rank_zero():
    assert close(lambda w, x: x @ w, make((5, 1), (1, 7), rank=0), X) == ()


def test_bfloat16_keeps_its_dtype_and_its_accuracy():
    leaf = make((64, 1), (1, 48), rank=8, dtype="bfloat16")
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 64)), jnp.bfloat16)
    assert close(lambda w, x: x @ w, leaf, x, rtol=0.02) == ()
    mixed = make((64, 1), (1, 48), rank=8)
    assert close(lambda w, x: x @ w.astype(jnp.bfloat16), mixed, x, rtol=0.02) == ()


def test_the_plain_array_appears_nowhere():
    leaf = make((96, 1), (1, 160), rank=8)
    x = jnp.ones((4, 96))

    def loss(parts, x):
        return jnp.sum(jc.execute(lambda w, x: jnp.tanh(x @ w))(parts, x))

    text = jax.jit(jax.value_and_grad(loss)).lower(leaf, x).compile().as_text()
    assert "[96,160]" not in text
    assert "[160,96]" not in text


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (("NHWC", "HWIO", "NHWC"), {}),
        (("NCHW", "OIHW", "NCHW"), {"rhs_dilation": (2, 1)}),
        (("NHWC", "HWIO", "NHWC"), {"window_strides": (2, 2), "padding": "VALID"}),
    ],
)
def test_a_convolution_is_a_narrow_one_and_a_matmul(spec, options):
    sizes = {"H": 3, "W": 2, "I": 5, "O": 7}
    left, right = ([sizes[n] if (n == "O") == of_output else 1 for n in spec[1]] for of_output in (False, True))
    image = {"N": 2, "H": 8, "W": 9, "C": 5}
    x = jnp.asarray(np.random.default_rng(1).normal(size=[image[n] for n in spec[0]]), jnp.float32)
    options = {"window_strides": (1, 1), "padding": "SAME"} | options

    def apply(w, x):
        return jax.lax.conv_general_dilated(x, w, dimension_numbers=spec, **options)

    assert close(apply, make(left, right), x) == ()
    other_way = make(right, left)
    assert close(apply, other_way, x) == ()


def test_a_grouped_convolution_gets_the_plain_kernel():
    def apply(w, x):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )

    (note,) = close(apply, make((3, 3, 2, 1), (1, 1, 1, 6)), jnp.ones((2, 5, 5, 4)))
    assert note.primitive == "conv_general_dilated"


def test_gradients_of_the_factors_under_scan_and_remat():
    leaf = make((3, 5, 1), (3, 1, 5))

    def apply(w, x):
        return jax.lax.scan(jax.checkpoint(lambda c, layer: (jnp.tanh(c @ layer), None)), x, w)[0].sum()

    assert fallbacks(apply, leaf, X) == ()
    got = jax.grad(lambda leaf: jc.execute(apply)(leaf, X))(leaf)
    wanted = jax.grad(lambda leaf: apply(leaf.materialize(), X))(leaf)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_vmap_over_stacked_factors_and_over_inputs():
    leaf = make((3, 5, 1), (3, 1, 7))
    run = jax.vmap(jc.execute(lambda w, x: x @ w), in_axes=(0, None))
    np.testing.assert_allclose(run(leaf, X), jnp.einsum("bi,sio->sbo", X, leaf.materialize()), rtol=1e-4, atol=1e-5)
    flat = make((5, 1), (1, 7))
    rows = jax.vmap(functools.partial(jc.execute(lambda w, x: x @ w), flat))(X)
    np.testing.assert_allclose(rows, X @ flat.materialize(), rtol=1e-4, atol=1e-5)
