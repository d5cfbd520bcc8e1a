"""Experts in a ragged matmul: what each multiplies is only known when the model runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import calibration, quantization, trace
from jaxcompress._src.execution.execute import fallbacks

RNG = np.random.default_rng(0)
SIZES = np.array([[4, 0, 3], [1, 0, 5]])
"""Rows of each of three experts, in two batches of eight; the last rows belong to none."""

X = RNG.normal(size=(2, 8, 4)).astype(np.float32)
BATCHES = [(jnp.asarray(x), jnp.asarray(sizes)) for x, sizes in zip(X, SIZES, strict=True)]
STORED_OUT_IN = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)


def _apply(params, x, sizes):
    first = jax.lax.ragged_dot(x, params["up"], sizes)
    return jax.lax.ragged_dot_general(jnp.tanh(first), params["down"], sizes, STORED_OUT_IN)


@pytest.fixture(scope="module")
def params():
    shapes = {"up": (3, 4, 5), "down": (3, 2, 5)}
    return {name: jnp.asarray(RNG.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def _rows(x, sizes, expert):
    start = sizes[:expert].sum()
    return np.asarray(x, np.float64)[start : start + sizes[expert]]


def test_layouts_take_experts_for_a_stack(params):
    found = trace.layouts(_apply, params, *BATCHES[0])
    up, down = found["up"], found["down"]
    assert (up.kind, up.stack_axes, up.input_axes, up.output_axes) == ("matmul", (0,), (1,), (2,))
    assert (down.kind, down.stack_axes, down.input_axes, down.output_axes) == ("matmul", (0,), (2,), (1,))
    assert up.flops == 2 * 8 * 4 * 5


def test_rows_are_counted_for_each_expert(params):
    found = calibration.input_statistics(_apply, params, BATCHES)
    wide = {name: np.asarray(w, np.float64) for name, w in params.items()}
    for expert in range(3):
        rows = np.concatenate([_rows(x, sizes, expert) for x, sizes in zip(X, SIZES, strict=True)])
        for name, x in (("up", rows), ("down", np.tanh(rows @ wide["up"][expert]))):
            assert found[name].count[expert] == len(rows)
            np.testing.assert_allclose(found[name].gram[expert], x.T @ x, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found[name].absolute_max[expert], np.abs(x).max(0, initial=0), rtol=1e-5)


def test_equal_rows_are_shared_only_in_equal_parts(params):
    both = dict.fromkeys(("gate", "up", "other"), params["up"])

    def apply(p, x, sizes):
        parts = [jax.lax.ragged_dot(x, p[name], sizes) for name in ("gate", "up")]
        return [*parts, jax.lax.ragged_dot(x, p["other"], sizes[::-1])]

    found = calibration.input_statistics(apply, both, BATCHES[:1])
    assert found["gate"] is found["up"]
    assert (found["gate"].count.tolist(), found["other"].count.tolist()) == ([4, 0, 3], [3, 0, 4])


def test_a_mask_of_tokens_says_nothing_of_sorted_rows(params):
    with pytest.raises(ValueError, match=r"of 2 leaves:\n  'down': its rows are in the order of the experts"):
        calibration.input_statistics(_apply, params, BATCHES, row_mask=lambda x, sizes: jnp.ones(8))


def test_layers_of_experts(params):
    layers = {"w": jnp.asarray(RNG.normal(size=(2, 3, 4, 4)) / 2, jnp.float32)}
    step = lambda sizes: lambda y, w: (jnp.tanh(jax.lax.ragged_dot(y, w, sizes)), None)  # noqa: E731
    apply = lambda p, x, sizes: jax.lax.scan(step(sizes), x, p["w"])[0]  # noqa: E731
    found = calibration.input_statistics(apply, layers, BATCHES[:1])["w"]
    x, sizes = X[0].astype(np.float64), SIZES[0]
    for layer in range(2):
        for expert in range(3):
            rows = _rows(x, sizes, expert)
            np.testing.assert_allclose(found.gram[layer, expert], rows.T @ rows, rtol=1e-4, atol=1e-5)
        w = np.asarray(layers["w"][layer], np.float64)
        own = [np.tanh(_rows(x, sizes, expert) @ w[expert]) for expert in range(3)]
        x = np.concatenate([*own, np.zeros((8 - sizes.sum(), 4))])
    np.testing.assert_array_equal(found.count, [[4, 0, 3], [4, 0, 3]])


def test_rounded_experts_run(params):
    at = trace.layouts(_apply, params, *BATCHES[0])
    small, _ = quantization.quantize(params, quantization.QuantSpec(bits=8), layouts=at)
    np.testing.assert_allclose(
        jc.execute(_apply)(small, *BATCHES[0]), _apply(jc.materialize(small), *BATCHES[0]), rtol=1e-5, atol=1e-5
    )
    made = [(entry.path, entry.primitive) for entry in fallbacks(_apply, small, *BATCHES[0])]
    assert made == [("up", "ragged_dot_general"), ("down", "ragged_dot_general")]


def test_other_kinds_of_ragged_matmuls_are_not_followed(params):
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    apply = lambda p, x, sizes: jax.lax.ragged_dot_general(x, p["w"], sizes, numbers)  # noqa: E731
    found = trace.layouts(apply, {"w": jnp.ones((8, 4))}, *BATCHES[0])["w"]
    assert found.kind == "other"
    assert found.reason == "it goes into `ragged_dot_general`, but not as one matrix for each part of the rows"
