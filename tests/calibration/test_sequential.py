"""The sequential driver: order, what each group sees, stacks, and what comes back."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import calibration, tree
from jaxcompress._src.tree.unselected import is_unselected

RNG = np.random.default_rng(1)
X = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)


def _apply(params, x):
    gates = jnp.tanh(x @ params["a"]) * jnp.tanh(x @ params["b"])
    return gates @ params["last"]


PARAMS = {name: jnp.asarray(RNG.normal(size=(4, 4)) / 2, jnp.float32) for name in ("last", "a", "b")}


def _double(seen):
    def fn(params, statistics, layouts):
        names = [path for path, _ in tree.leaves_with_paths(params)]
        seen.append((names, jax.tree.leaves(statistics, is_leaf=_is_statistics)[0], layouts))
        return jax.tree.map(lambda w: 2 * w, params), {name: len(seen) for name in names}

    return fn


def _is_statistics(leaf):
    return isinstance(leaf, calibration.InputStatistics)


def test_groups_in_execution_order_see_what_earlier_ones_became():
    seen = []
    doubled, info = calibration.sequential(_apply, PARAMS, [(X[:2],), (X[2:],)], _double(seen))
    assert [names for names, _, _ in seen] == [["a", "b"], ["last"]]
    assert info == {"a": 1, "b": 1, "last": 2}
    x, a, b = (np.asarray(value, np.float64) for value in (X, PARAMS["a"], PARAMS["b"]))
    np.testing.assert_allclose(seen[0][1].gram, x.T @ x, rtol=1e-5, atol=1e-5)
    y = np.tanh(x @ (2 * a)) * np.tanh(x @ (2 * b))
    np.testing.assert_allclose(seen[1][1].gram, y.T @ y, rtol=1e-4, atol=1e-5)
    assert seen[1][1].count == 6
    jax.tree.map(lambda w, v: np.testing.assert_array_equal(w, 2 * v), doubled, PARAMS)


def test_inputs_of_the_dense_model_against_the_new_ones():
    seen = []
    calibration.sequential(_apply, PARAMS, [(X,)], _double(seen), dense_inputs=True)
    x, a, b = (np.asarray(value, np.float64) for value in (X, PARAMS["a"], PARAMS["b"]))
    np.testing.assert_allclose(seen[0][1].cross, x.T @ x, rtol=1e-4, atol=1e-5)
    dense, new = (np.tanh(k * x @ a) * np.tanh(k * x @ b) for k in (1, 2))
    np.testing.assert_allclose(seen[1][1].cross, dense.T @ new, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen[1][1].gram, new.T @ new, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dense_inputs", [False, True])
def test_layers_of_a_scan_take_turns(dense_inputs):
    stack = {name: jnp.asarray(RNG.normal(size=(3, 4, 4)) / 2, jnp.float32) for name in ("one", "two")}

    def scanned(params, x):
        layer = jax.checkpoint(lambda y, w: (jnp.tanh(jnp.tanh(y @ w["one"]) @ w["two"]), None))
        return jax.lax.scan(layer, x, params)[0]

    def unrolled(params, x):
        for i in range(3):
            x = jnp.tanh(jnp.tanh(x @ params[f"one{i}"]) @ params[f"two{i}"])
        return x

    by_layer = {f"{name}{i}": stack[name][i] for name in stack for i in range(3)}
    seen, expected = [], []
    found, info = calibration.sequential(scanned, stack, [(X,)], _double(seen), dense_inputs=dense_inputs)
    calibration.sequential(unrolled, by_layer, [(X,)], _double(expected), dense_inputs=dense_inputs)
    assert list(info) == ["one[0]", "two[0]", "one[1]", "two[1]", "one[2]", "two[2]"]
    for (_, statistics, layouts), (_, wanted, _) in zip(seen, expected, strict=True):
        close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)  # noqa: E731
        jax.tree.map(close, statistics, wanted)
        (layout,) = (layout for layout in layouts.values() if not is_unselected(layout))
        assert (layout.stack_axes, layout.input_axes, layout.output_axes) == ((), (0,), (1,))
    jax.tree.map(lambda w, v: np.testing.assert_array_equal(w, 2 * v), found, stack)


def test_groups_together_see_the_same_model():
    seen = []
    calibration.sequential(_apply, PARAMS, [(X,)], _double(seen), together=lambda path: "all")
    expected = calibration.input_statistics(_apply, PARAMS, [(X,)])
    assert [names for names, _, _ in seen] == [["a", "b"], ["last"]]
    for (names, statistics, _), name in zip(seen, ("a", "last"), strict=True):
        np.testing.assert_allclose(statistics.gram, expected[name].gram, rtol=1e-5, err_msg=names[0])
    apart = []
    calibration.sequential(_apply, PARAMS, [(X,)], _double(apart), together=lambda path: path)
    assert float(jnp.abs(apart[1][1].gram - seen[1][1].gram).max()) > 0.1


def test_compressed_leaves_come_back_and_are_run_on():
    seen = []

    def fn(params, statistics, layouts):
        seen.append(jax.tree.leaves(statistics, is_leaf=_is_statistics)[0])
        return jc.quantization.quantize(params, jc.quantization.QuantSpec(bits=3), layouts=layouts)

    packed, _ = calibration.sequential(_apply, PARAMS, [(X,)], fn)
    assert all(isinstance(leaf, jc.arrays.QuantizedArray) for leaf in packed.values())
    plain = jc.materialize(packed)
    x, a, b = (np.asarray(value, np.float64) for value in (X, plain["a"], plain["b"]))
    y = np.tanh(x @ a) * np.tanh(x @ b)
    np.testing.assert_allclose(seen[1].gram, y.T @ y, rtol=1e-4, atol=1e-5)


def test_the_model_is_traced_as_often_for_many_groups_as_for_one():
    traces = []

    def deep(params, x):
        traces.append(1)
        for w in params:
            x = jnp.tanh(x @ w)
        return x

    counts = []
    for depth in (1, 5):
        traces.clear()
        calibration.sequential(deep, [PARAMS["a"]] * depth, [(X,), (X,)], _double([]))
        counts.append(len(traces))
    assert counts[0] == counts[1]


def test_what_fn_returns_is_checked():
    run = lambda fn: calibration.sequential(_apply, PARAMS, [(X,)], fn)  # noqa: E731
    with pytest.raises(ValueError, match=r"leaf 'a' as float32\(4, 2\), expected float32\(4, 4\)"):
        run(lambda p, s, layouts: (jax.tree.map(lambda w: w[:, :2], p), {}))
    with pytest.raises(ValueError, match="structure of its params; leaf 'a' is missing"):
        run(lambda p, s, layouts: (dict.fromkeys(p, tree.Unselected), {}))
    with pytest.raises(ValueError, match="`batches` is empty"):
        calibration.sequential(_apply, PARAMS, [], _double([]))


SMALL = jc.quantization.QuantSpec(bits=4, group_size=2)


def _rounding(bits_of_call=lambda call: 4):
    calls = []

    def fn(params, statistics, layouts):
        calls.append(None)
        spec = dataclasses.replace(SMALL, bits=bits_of_call(len(calls)))
        return jc.quantization.gptq(params, statistics, spec, layouts=layouts)

    return fn


def _scanned(axis):
    def apply(params, x):
        stack = jnp.moveaxis(params["w"], axis, 0)
        return jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), x, stack)[0]

    return apply


def test_compressed_entries_of_a_stack_are_stacked():
    """Against the layers written out; and the model runs on the stacked codes, slice by slice."""
    layers = [jnp.asarray(RNG.normal(size=(4, 4)), jnp.float32) for _ in range(3)]
    flat = lambda params, x: functools.reduce(lambda y, i: jnp.tanh(y @ params[f"w{i}"]), range(3), x)  # noqa: E731
    wanted, _ = calibration.sequential(flat, {f"w{i}": w for i, w in enumerate(layers)}, [(X,)], _rounding())
    found, info = calibration.sequential(_scanned(0), {"w": jnp.stack(layers)}, [(X,)], _rounding())
    assert list(info) == ["w[0]", "w[1]", "w[2]"]
    assert (found["w"].shape, found["w"].bits) == ((3, 4, 4), 4)
    np.testing.assert_array_equal(found["w"].codes(), np.stack([wanted[f"w{i}"].codes() for i in range(3)]))
    plain = jc.materialize(found)
    np.testing.assert_array_equal(plain["w"], np.stack([wanted[f"w{i}"].materialize() for i in range(3)]))
    np.testing.assert_allclose(jc.execute(_scanned(0))(found, X), _scanned(0)(plain, X), atol=1e-6)


def test_compressed_entries_that_cannot_be_stacked_are_named():
    params = {"w": jnp.asarray(RNG.normal(size=(4, 3, 4)), jnp.float32)}
    with pytest.raises(ValueError, match=r"Entry 0 of the stack 'w' came back as QuantizedArray, .* along axis 1"):
        calibration.sequential(_scanned(1), params, [(X,)], _rounding())
    params = {"w": jnp.moveaxis(params["w"], 1, 0)}
    with pytest.raises(ValueError, match=r"3 of the 3 entries of the stack 'w' .* in 2 different forms"):
        calibration.sequential(_scanned(0), params, [(X,)], _rounding(lambda call: 2 + 2 * (call > 1)))
    calls = []

    def only_the_first(params, statistics, layouts):
        calls.append(None)
        return _rounding()(params, statistics, layouts) if len(calls) == 1 else (params, {})

    with pytest.raises(ValueError, match="1 of the 3 entries of the stack 'w'"):
        calibration.sequential(_scanned(0), params, [(X,)], only_the_first)


def _energies(apply, params):
    """Of the input of each layer, in the order in which layers of one number take turns and are halved."""
    seen = []

    def halve(params, statistics, layouts):
        found = jax.tree.leaves(statistics, is_leaf=lambda node: isinstance(node, calibration.InputStatistics))
        seen.extend(float(one.gram[0, 0]) for one in found)
        return jax.tree.map(lambda w: w / 2, params), {}

    calibration.sequential(apply, params, [(jnp.ones((1, 1)),)], halve)
    return seen


@pytest.mark.parametrize(
    "order",
    [
        lambda w: w,
        lambda w: w[::-1],
        lambda w: jnp.roll(w, 1, axis=0),
        lambda w: w[jnp.array([2, 0, 1])],
    ],
    ids=["in order", "flipped", "rolled", "gathered"],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_layers_of_a_scan_take_turns_in_the_order_in_which_they_run(order, reverse):
    def apply(p, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, order(p["w"]), reverse=reverse)[0]

    assert _energies(apply, {"w": jnp.ones((3, 1, 1))}) == [1, 1 / 4, 1 / 16]


def test_runs_of_a_split_stack_take_turns_in_the_order_in_which_they_run():
    def apply(p, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, tree.join_stacks(p)["w"])[0]

    params = tree.split_stacks({"w": jnp.ones((4, 1, 1))}, [1, 3], select=tree.by_path("w"))
    assert _energies(apply, params) == [1, 1 / 4, 1 / 16, 1 / 64]
