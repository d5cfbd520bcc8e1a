"""Statistics of leaves that are re-arranged before they meet their inputs, in the order of the leaf itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import calibration, trace, tree
from jaxcompress._src.calibration.sites import kernels_at_work
from jaxcompress.quantization import QuantSpec, gptq

RNG = np.random.default_rng(0)


def _array(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def effective_rows(apply, leaf, inputs, outputs):
    """The rows that a linear model multiplies by a leaf, (rows, inputs), read from its derivative in float64.

    Args:
        apply: `leaf -> array`, linear.
        leaf: where.
        inputs: its input axes.
        outputs: its output axes.
    """
    jacobian = np.asarray(jax.jit(jax.jacobian(apply))(leaf), np.float64)
    made = jacobian.ndim - leaf.ndim
    order = (*range(made), *(made + axis for axis in outputs), *(made + axis for axis in inputs))
    sizes = [int(np.prod([leaf.shape[axis] for axis in axes], dtype=int)) for axes in (outputs, inputs)]
    # Each number that the model writes is of one output: its row is where it depends on the leaf.
    return jacobian.transpose(order).reshape(-1, *sizes)


def gram_of(rows):
    """Σ x xᵀ over the rows of one output; the same for all outputs that there are."""
    grams = np.einsum("nod,noe->ode", rows, rows)
    grams = grams[np.abs(grams).sum(axis=(1, 2)) > 0]
    assert all(np.allclose(gram, grams[0]) for gram in grams)
    return grams[0]


PERMUTED = {
    "merge": lambda w: w.reshape(2, 8, 4).transpose(1, 0, 2).reshape(16, 4),
    "rows": lambda w: w[np.array([3, 1, 2, 0, 7, 6, 5, 4, 8, 10, 9, 11, 15, 14, 13, 12])],
    "reverse": lambda w: w[::-1],
    "roll": lambda w: jnp.roll(w, 3, axis=0),
    "scalar": lambda w: w * 0.5,
    "scalar, then rolled along the outputs": lambda w: jnp.roll(w * 0.5, 1, axis=1),
    "negative, then rolled along the outputs": lambda w: jnp.roll(-w, 1, axis=1),
    "negative": lambda w: jnp.concatenate([w[8:], -w[:8]]),
    "features": lambda w: w * jnp.linspace(0.5, 2, 16)[:, None],
    "quotient": lambda w: jnp.flip(w / jnp.linspace(0.5, 2, 16)[:, None], 0),
    "added": lambda w: w + jnp.ones((16, 4)),
    "masked rows": lambda w: jnp.where((jnp.arange(16) % 3 > 0)[:, None], w, 0.0),
    "twice": lambda w: jnp.concatenate([w[:8], w[:8]]),
}


@pytest.mark.parametrize("name", PERMUTED)
def test_the_gram_is_in_the_order_of_the_leaf(name):
    move, w, x = PERMUTED[name], _array(16, 4), _array(7, 16)
    layout = trace.layouts(lambda p, y: y @ move(p["w"]), {"w": w}, x)["w"]
    assert (layout.kind, layout.input_axes, layout.output_axes) == ("matmul", (0,), (1,))
    found = calibration.input_statistics(lambda p, y: y @ move(p["w"]), {"w": w}, [(x,)])["w"]
    np.testing.assert_allclose(found.gram, gram_of(effective_rows(lambda v: x @ move(v), w, (0,), (1,))), atol=1e-4)
    assert found.count == 7


def test_tensordot_over_axes_in_another_order():
    w, x = _array(3, 5, 2), _array(7, 5, 3)
    apply = lambda p, y: jnp.tensordot(y, p["w"], axes=((2, 1), (0, 1)))  # noqa: E731
    swapped = lambda p, y: jnp.tensordot(y.swapaxes(1, 2), p["w"], axes=((2, 1), (1, 0)))  # noqa: E731
    rows = np.asarray(x, np.float64).transpose(0, 2, 1).reshape(7, 15)
    for model in (apply, swapped):
        found = calibration.input_statistics(model, {"w": w}, [(x,)])["w"]
        np.testing.assert_allclose(found.gram, rows.T @ rows, atol=1e-4)


def _merged(p, x):
    return (x * p["scale"][None]) @ PERMUTED["merge"](p["w"])


def test_methods_on_a_permuted_merge():
    params = {"scale": jnp.ones(16), "w": _array(16, 4)}
    # Correlated inputs of very different sizes: a wrong order costs a lot.
    x = jnp.asarray(RNG.normal(size=(256, 16)) @ RNG.normal(size=(16, 16)) * np.arange(1.0, 17), jnp.float32)
    statistics = calibration.input_statistics(_merged, params, [(x,)])
    folds = trace.folds(_merged, params, x)
    assert folds == []
    axes = trace.layouts(_merged, params, x)
    small, info = gptq(params, statistics, QuantSpec(bits=3), select=tree.by_path("w"), layouts=axes)
    wanted = _merged(params, x)
    gap = jnp.linalg.norm(_merged(jc.materialize(small), x) - wanted) / jnp.linalg.norm(wanted)
    np.testing.assert_allclose(float(gap), info["w"].error, rtol=1e-3)
    plain = {"scale": params["scale"], "w": PERMUTED["merge"](params["w"])}
    direct = lambda p, y: (y * p["scale"][None]) @ p["w"]  # noqa: E731
    sums = calibration.input_statistics(direct, plain, [(x,)])
    other, _ = gptq(plain, sums, QuantSpec(bits=3), select=tree.by_path("w"))
    expected = jnp.linalg.norm(direct(jc.materialize(other), x) - wanted) / jnp.linalg.norm(wanted)
    np.testing.assert_allclose(float(gap), float(expected), rtol=0.02)


def test_layers_of_a_pipeline_keep_their_own_statistics():
    """Stages of layers, split and transposed: layers 1 and 2 change places."""
    w, x = _array(4, 3, 3) / 2, _array(5, 3)

    def staged(p, y):
        layers = p["w"].reshape(2, 2, 3, 3).transpose(1, 0, 2, 3).reshape(4, 3, 3)
        return jax.lax.scan(lambda z, layer: (jnp.tanh(z @ layer), None), y, layers)[0]

    def nested(p, y):
        def stage(z, layers):
            return jax.lax.scan(lambda u, layer: (jnp.tanh(u @ layer), None), z, layers)[0], None

        return jax.lax.scan(stage, y, p["w"].reshape(2, 2, 3, 3))[0]

    def indexed(p, y):
        def layer(k, z):
            return jnp.tanh(z @ p["w"].reshape(2, 2, 3, 3)[k // 2, k % 2])

        return jax.lax.fori_loop(0, 4, layer, y)

    for apply, order in ((staged, (0, 2, 1, 3)), (nested, range(4)), (indexed, range(4))):
        grams, rows = np.zeros((4, 3, 3)), np.asarray(x, np.float64)
        for entry in order:
            grams[entry], rows = rows.T @ rows, np.tanh(rows @ np.asarray(w[entry], np.float64))
        layout = trace.layouts(apply, {"w": w}, x)["w"]
        assert (layout.kind, layout.stack_axes, layout.input_axes, layout.output_axes) == ("matmul", (0,), (1,), (2,))
        found = calibration.input_statistics(apply, {"w": w}, [(x,)])["w"]
        np.testing.assert_allclose(found.gram, grams, atol=1e-4, err_msg=apply.__name__)
        np.testing.assert_array_equal(found.count, [5, 5, 5, 5])


def test_a_constant_on_the_other_side():
    basis = RNG.normal(size=(6, 4)).astype(np.float32)
    params, x = {"w": _array(4, 3), "v": _array(3, 2)}, _array(5, 6)
    apply = lambda p, y: (y @ (basis @ p["w"])) @ p["v"]  # noqa: E731
    found = calibration.input_statistics(apply, params, [(x,)])
    np.testing.assert_allclose(found["w"].gram, basis.astype(np.float64).T @ basis, atol=1e-4)
    (fold,) = trace.folds(apply, params, x)
    assert [(leaf.path, leaf.axes) for leaf in (*fold.producers, *fold.consumers)] == [("w", (1,)), ("v", (0,))]
    pauses = kernels_at_work(apply, params, x)
    assert [part.path for part in pauses][-1] == "v"
    left = lambda p, y: jnp.tanh(y @ p["v"].T) @ p["w"].T @ basis.T  # noqa: E731
    rows = np.tanh(np.asarray(x[:, :2], np.float64) @ np.asarray(params["v"], np.float64).T)
    found = calibration.input_statistics(left, params, [(x[:, :2],)])
    np.testing.assert_allclose(found["w"].gram, rows.T @ rows, atol=1e-4)


def test_leaves_side_by_side_keep_their_own_inputs():
    """Concatenated along inputs, along outputs, and stacked for a scan or a batched matmul."""
    params = {"a": _array(2, 4), "b": _array(3, 4), "c": _array(5, 2), "one": _array(4, 4), "two": _array(4, 4)}
    x, y = _array(7, 5), _array(2, 6, 4)

    def apply(p, x, y):
        rows = jnp.concatenate([jnp.concatenate([p["b"][::-1], p["a"]]), p["c"]], axis=1)
        layers = jnp.stack([p["two"], p["one"]])
        scanned = jax.lax.scan(lambda z, layer: (z, z @ layer), y[0], layers)[1]
        batched = jnp.einsum("sni,sio->sno", y, jnp.stack([p["one"], p["one"] * 2]))
        return x @ rows, scanned, batched

    layouts = trace.layouts(apply, params, x, y)
    assert {name: layout.kind for name, layout in layouts.items()} == dict.fromkeys(params, "matmul")
    assert layouts["a"].flops + layouts["b"].flops + layouts["c"].flops == 2 * 7 * 5 * 6
    found = calibration.input_statistics(apply, params, [(x, y)])
    rows, layers = np.asarray(x, np.float64), np.asarray(y, np.float64)
    np.testing.assert_allclose(found["a"].gram, rows[:, 3:].T @ rows[:, 3:], atol=1e-4)
    turned = rows[:, [2, 1, 0]]
    np.testing.assert_allclose(found["b"].gram, turned.T @ turned, atol=1e-4)
    np.testing.assert_allclose(found["c"].gram, rows.T @ rows, atol=1e-4)
    np.testing.assert_allclose(found["two"].gram, layers[0].T @ layers[0], atol=1e-4)
    # Once in the scan, and twice in the batch, where it counts double the second time.
    expected = 2 * layers[0].T @ layers[0] + 4 * layers[1].T @ layers[1]
    np.testing.assert_allclose(found["one"].gram, expected, rtol=1e-5, atol=1e-4)
    assert [float(found[name].count) for name in ("a", "b", "c", "two", "one")] == [7, 7, 7, 6, 18]


@pytest.mark.parametrize("separate", [False, True])
def test_a_fused_kernel_that_is_split_counts_its_rows_once(separate):
    w, x = _array(4, 9), _array(7, 4)

    def apply(p, x):
        query, key, value = jnp.split(p["w"], 3, axis=1)
        return x @ query, x @ key, (2 * x if separate else x.astype(jnp.float32)) @ value

    if separate:
        with pytest.raises(ValueError, match="'w': it is split along its outputs, and its parts multiply different"):
            calibration.input_statistics(apply, {"w": w}, [(x,)])
        return
    found = calibration.input_statistics(apply, {"w": w}, [(x,)])["w"]
    np.testing.assert_allclose(found.gram, np.asarray(x, np.float64).T @ np.asarray(x, np.float64), atol=1e-4)
    assert found.count == 7


def test_products_that_are_no_matrix_of_the_leaf_are_refused_with_a_reason():
    reasons = {
        "entry by entry": lambda w: w * jnp.arange(12.0).reshape(4, 3),
        "re-arrangement of itself": lambda w: w + w[::-1],
        "`reduce_sum`": lambda w: w * jnp.sum(w),
        "`tanh`": lambda w: jnp.tanh(w),
        "`convert_element_type`": lambda w: w.astype(jnp.int8).astype(jnp.float32),
    }
    for reason, move in reasons.items():
        layout = trace.layouts(lambda p, x, move=move: x @ move(p["w"]), {"w": _array(4, 3)}, _array(2, 4))["w"]
        assert layout.kind == "other"
        assert reason in layout.reason


def test_a_convolution_with_a_turned_kernel():
    """As transposed convolutions have it: patches come in the order of the leaf."""
    w, x = _array(3, 2, 4), _array(1, 6, 2)

    def apply(p, x):
        return jax.lax.conv_general_dilated(x, p["w"][::-1], (1,), "VALID", dimension_numbers=("NHC", "HIO", "NHC"))

    found = calibration.input_statistics(apply, {"w": w}, [(x,)])["w"]
    image = np.asarray(x, np.float64)[0]
    rows = np.stack([image[at : at + 3][::-1].reshape(-1) for at in range(4)])
    np.testing.assert_allclose(found.gram, rows.T @ rows, atol=1e-4)


def test_heads_that_share_keys_add_up_their_rows():
    """Grouped queries: each entry of the stack meets the rows of all heads that repeat it."""
    w, x = _array(2, 3, 4), _array(5, 6, 3)

    def apply(p, x):
        return jnp.einsum("nhi,hio->nho", x, jnp.repeat(p["w"], 3, axis=0))

    found = calibration.input_statistics(apply, {"w": w}, [(x,)])["w"]
    rows = np.asarray(x, np.float64).reshape(5, 2, 3, 3)
    np.testing.assert_allclose(found.gram, np.einsum("nghi,nghj->gij", rows, rows), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.absolute_max, np.abs(rows).max(axis=(0, 2)), rtol=1e-6)
    np.testing.assert_array_equal(found.count, [15, 15])


def test_outputs_that_are_multiplied_weigh_the_rows_of_each_use():
    """The mean over the outputs: (x one, multiplied by nothing) and (x two, whose outputs are multiplied by c)."""
    w, one, two, c = _array(4, 3), _array(5, 4), _array(6, 4), jnp.array([1.0, 2.0, 3.0])

    def apply(p, one, two):
        return one @ p["w"], two @ (p["w"] * c[None])

    found = calibration.input_statistics(apply, {"w": w}, [(one, two)])["w"]
    one, two = np.asarray(one, np.float64), np.asarray(two, np.float64)
    np.testing.assert_allclose(found.gram, one.T @ one + 14 / 3 * (two.T @ two), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.count, 11)
    np.testing.assert_allclose(found.absolute_max, np.abs(np.concatenate([one, two])).max(axis=0), rtol=1e-6)


@pytest.mark.parametrize("first", ["query", "key"])
def test_parts_of_a_fused_kernel_weigh_the_rows_that_they_share(first):
    """Two of the three parts are repeated four times: an output meets (1 + 4 + 4) / 3 times the rows, on average."""
    w, x = _array(4, 6), _array(7, 4)

    def apply(p, x):
        query, key, value = jnp.split(p["w"], 3, axis=1)
        parts = [x @ query, x @ jnp.repeat(key, 4, axis=1), x @ jnp.repeat(value, 4, axis=1)]
        return parts if first == "query" else parts[::-1]

    found = calibration.input_statistics(apply, {"w": w}, [(x,)])["w"]
    rows = np.asarray(x, np.float64)
    np.testing.assert_allclose(found.gram, 3 * rows.T @ rows, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.absolute_sum, np.abs(rows).sum(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(found.count, 7)


def test_a_scaled_kernel_that_is_split_has_the_mean_square_of_its_scales():
    w, x, scale = _array(4, 6), _array(7, 4), jnp.arange(1.0, 7)

    def apply(p, x):
        return [x @ part for part in jnp.split(p["w"] * scale[None], 3, axis=1)]

    found = calibration.input_statistics(apply, {"w": w}, [(x,)])["w"]
    rows = np.asarray(x, np.float64)
    np.testing.assert_allclose(found.gram, 91 / 6 * (rows.T @ rows), rtol=1e-5, atol=1e-4)


def test_groups_of_a_convolution_have_the_scales_of_their_own_outputs():
    def apply(p, x):
        kernel = p["w"] * jnp.array([1.0, 2, 10, 20])[None, None]
        numbers = ("NHC", "HIO", "NHC")
        return jax.lax.conv_general_dilated(x, kernel, (1,), "VALID", dimension_numbers=numbers, feature_group_count=2)

    found = calibration.input_statistics(apply, {"w": _array(1, 2, 4)}, [(jnp.eye(4)[None],)])["w"]
    np.testing.assert_allclose(found.gram, np.array([2.5, 250.0])[:, None, None] * np.eye(2)[None], rtol=1e-6)


def test_outputs_that_one_use_masks_count_for_the_other_one_alone():
    w, x, y = _array(4, 6), jnp.diag(jnp.array([1.0, 1, 0, 0])), jnp.diag(jnp.array([0.0, 0, 1, 1]))

    def apply(p, x, y):
        return x @ jnp.where((jnp.arange(6) < 3)[None], p["w"], 0.0), y @ p["w"]

    found = calibration.input_statistics(apply, {"w": w}, [(x, y)])["w"]
    np.testing.assert_allclose(found.gram, np.diag([0.5, 0.5, 1, 1]), rtol=1e-6)


def test_outputs_scaled_differently_in_each_entry_of_a_batch_are_refused():
    x, scale = _array(2, 5, 4), _array(2, 1, 6)

    def apply(p, x):
        return jnp.einsum("bnd,bdr->bnr", x, p["w"][None] * scale)

    with pytest.raises(ValueError, match="other numbers in each entry of a batch"):
        calibration.input_statistics(apply, {"w": _array(4, 6)}, [(x,)])


def test_scaled_outputs_on_an_explicit_mesh():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        cut = jax.NamedSharding(mesh, jax.P(None, "b"))
        scale = jnp.broadcast_to(jnp.arange(1.0, 9), (2, 4, 1, 8))
        params = {"w": jax.device_put(jnp.ones((2, 4, 8, 8)), cut), "g": jax.device_put(scale, cut)}

        def apply(p, x):
            return jnp.einsum("nghi,ghio->ngho", x, p["w"] * p["g"])

        found = calibration.input_statistics(apply, params, [(jnp.ones((8, 2, 4, 8)),)], select=tree.by_path("w"))
    np.testing.assert_allclose(found["w"].gram, np.full((2, 4, 8, 8), 8 * 204 / 8), rtol=1e-6)


def test_outputs_in_one_place_and_a_batch_in_another_are_no_one_matrix():
    w, one, two = _array(2, 4, 3), _array(5, 4), _array(5, 2, 4)

    def apply(p, one, two):
        return jnp.einsum("ni,hio->nho", one, p["w"]), jnp.einsum("nhi,hio->nho", two, p["w"])

    with pytest.raises(ValueError, match="batch along axes"):
        calibration.input_statistics(apply, {"w": w}, [(one, two)])


def test_look_ups_count_the_rows_of_the_leaf():
    table, ids = _array(5, 3), jnp.array([0, 1, 1, 4])
    found = calibration.input_statistics(lambda p, ids: p["t"][::-1][ids] + p["t"].T[:, ids].T, {"t": table}, [(ids,)])
    assert found["t"].rows.tolist() == [2, 2, 0, 2, 2]
    assert trace.layouts(lambda p, x: x + p["t"][jnp.arange(4)], {"t": table}, _array(4, 3))["t"].kind == "lookup"


def test_a_leaf_between_zeros_along_a_batch_axis():
    leaf, x = _array(4, 3, 5), _array(3, 6, 3)

    def apply(w, x):
        return jnp.einsum("abcd,bnc->abnd", jnp.pad(w[:, None], ((0, 0), (1, 1), (0, 0), (0, 0))), x)

    found = calibration.input_statistics(apply, leaf, [(x,)], statistics=("gram",))
    rows = np.asarray(x[1], np.float64)
    np.testing.assert_allclose(found.gram, rows.T @ rows, rtol=1e-5)
    assert float(found.count) == len(rows)
