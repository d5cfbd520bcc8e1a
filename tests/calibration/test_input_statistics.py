"""Statistics of inputs against NumPy in float64, through every way in which a model uses a leaf."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcompress as jc
from jaxcompress import calibration, tree
from jaxcompress._src.calibration.input_statistics import statistics_nbytes

RNG = np.random.default_rng(0)


def _reference(x, weights=None):
    """The statistics of rows, (..., D), in float64."""
    x = np.asarray(x, np.float64).reshape(-1, np.shape(x)[-1])
    weights = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64).reshape(-1)
    x = x[weights > 0]
    weights = weights[weights > 0][:, None]
    return {
        "count": weights.sum(),
        "gram": (weights * x).T @ x,
        "squared_sum": (weights * x**2).sum(0),
        "absolute_sum": (weights * np.abs(x)).sum(0),
        "absolute_max": np.abs(x).max(0),
    }


def _check(found, expected, rtol=1e-5):
    for name, wanted in expected.items():
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(getattr(found, name), wanted, rtol=rtol, atol=rtol * scale, err_msg=name)


def _mlp(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


@pytest.fixture(scope="module")
def mlp():
    params = {"up": RNG.normal(size=(5, 7)), "down": RNG.normal(size=(7, 3))}
    batches = [(RNG.normal(size=(2, 3, 5)),), (RNG.normal(size=(4, 3, 5)),), (RNG.normal(size=(2, 3, 5)),)]
    return jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), (params, batches))


def test_all_statistics_of_a_stream(mlp):
    params, batches = mlp
    found = calibration.input_statistics(_mlp, params, iter(batches))
    rows = np.concatenate([np.asarray(x, np.float64).reshape(-1, 5) for (x,) in batches])
    _check(found["up"], _reference(rows))
    _check(found["down"], _reference(np.tanh(rows @ np.asarray(params["up"], np.float64))))
    np.testing.assert_allclose(found["up"].absolute_mean, np.abs(rows).mean(0), rtol=1e-5)


def test_only_what_is_asked_for(mlp):
    params, batches = mlp
    found = calibration.input_statistics(
        _mlp, params, batches, select=tree.by_path("down"), statistics=("squared_sum", "absolute_max")
    )
    assert found["up"] is tree.Unselected
    assert found["down"].gram is None
    assert found["down"].absolute_sum is None
    whole = calibration.input_statistics(_mlp, params, batches)["down"]
    np.testing.assert_allclose(found["down"].squared_sum, whole.squared_sum, rtol=1e-5)
    np.testing.assert_allclose(found["down"].absolute_max, whole.absolute_max)


def test_few_traces_for_many_batches(mlp):
    params, batches = mlp
    traces = []

    def counted(params, x):
        traces.append(x.shape)
        return _mlp(params, x)

    calibration.input_statistics(counted, params, 5 * batches)
    assert len(traces) == len({x.shape for (x,) in batches}) == 2
    # And none of the same function in another call.
    calibration.input_statistics(counted, params, batches[:1])
    assert len(traces) == 2


def test_attention_output_has_two_input_axes():
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)
    x = jnp.asarray(RNG.normal(size=(3, 4, 6)), jnp.float32)
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    found = calibration.input_statistics(lambda p, y: module.apply({"params": p}, y), params, [(x,)])
    # With the identity as its kernel, the projection shows its input.
    shown = params | {"out": {"kernel": jnp.eye(6).reshape(2, 3, 6), "bias": jnp.zeros(6)}}
    _check(found["out"]["kernel"], _reference(module.apply({"params": shown}, x)))
    _check(found["query"]["kernel"], _reference(x))
    assert found["query"]["kernel"] is found["key"]["kernel"] is found["value"]["kernel"]


def test_a_scanned_stack_has_one_statistic_for_each_layer():
    shapes = {"query": (3, 4, 5), "key": (3, 4, 5), "out": (3, 5, 4)}
    stack = {name: RNG.normal(size=shape) / 2 for name, shape in shapes.items()}
    x = RNG.normal(size=(2, 3, 4))

    def layer(y, w):
        return y + jnp.tanh((y @ w["query"]) * (y @ w["key"])) @ w["out"], None

    found = calibration.input_statistics(
        lambda p, y: jax.lax.scan(jax.checkpoint(layer), y, p)[0],
        jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), stack),
        [(jnp.asarray(x, jnp.float32),)],
    )
    assert found["query"] is found["key"]
    for i in range(3):
        w = {name: leaf[i] for name, leaf in stack.items()}
        inner = np.tanh((x @ w["query"]) * (x @ w["key"]))
        _check(jax.tree.map(lambda part, i=i: part[i], found["query"]), _reference(x), rtol=1e-4)
        _check(jax.tree.map(lambda part, i=i: part[i], found["out"]), _reference(inner), rtol=1e-4)
        x = x + inner @ w["out"]


@pytest.mark.parametrize("reverse", [False, True])
def test_loops_over_slices_conditions_and_remat(reverse):
    w = jnp.asarray(RNG.normal(size=(3, 4, 4)) / 2, jnp.float32)
    x = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)

    def by_scan(params, x):
        step = jax.checkpoint(lambda y, layer: (jnp.tanh(y @ layer), None))
        return jax.lax.scan(step, x, params["w"], reverse=reverse)[0]

    def by_index(params, x):
        return jax.lax.fori_loop(0, 3, lambda i, y: jnp.tanh(y @ params["w"][2 - i if reverse else i]), x)

    def by_while(params, x):
        def body(state):
            i, y = state
            at = 2 - i if reverse else i
            y = jax.lax.cond(i < 5, lambda layer, z: jnp.tanh(z @ layer), lambda _, z: z, params["w"][at], y)
            return i + 1, y

        return jax.lax.while_loop(lambda state: state[0] < 3, body, (0, x))[1]

    grams, y = np.zeros((3, 4, 4)), np.asarray(x, np.float64)
    for i in range(3)[:: -1 if reverse else 1]:
        grams[i], y = y.T @ y, np.tanh(y @ np.asarray(w[i], np.float64))
    for apply in (by_scan, by_index, by_while):
        found = calibration.input_statistics(apply, {"w": w}, [(x,)])["w"]
        np.testing.assert_allclose(found.gram, grams, rtol=1e-4, atol=1e-4, err_msg=apply.__name__)
        np.testing.assert_array_equal(found.count, [5, 5, 5])


def test_uses_of_one_leaf_add_up():
    w = jnp.asarray(RNG.normal(size=(4, 4)) / 2, jnp.float32)
    x = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)
    apply = lambda p, y: jax.lax.fori_loop(0, 2, lambda _, z: jnp.tanh(z @ p["w"]), y)  # noqa: E731
    found = calibration.input_statistics(apply, {"w": w}, [(x,)])["w"]
    rows = np.concatenate([x, np.tanh(np.asarray(x, np.float64) @ np.asarray(w, np.float64))])
    _check(found, _reference(rows))


def test_experts_on_a_batch_axis_and_leaves_on_either_side():
    model = zoo.batched_experts()
    found = calibration.input_statistics(model.apply, model.params, [model.inputs])["experts"]
    for expert, rows in enumerate(model.inputs[0]):
        np.testing.assert_allclose(found.gram[expert], _reference(rows)["gram"], rtol=1e-4, atol=1e-4)
    stored_out_in = zoo.conv1d_of_hf_gpt2()
    found = calibration.input_statistics(stored_out_in.apply, stored_out_in.params, [stored_out_in.inputs])
    _check(found["c_attn"]["kernel"], _reference(stored_out_in.inputs[0]))


@pytest.mark.parametrize(("strides", "dilation", "padding"), [((1, 1), 1, "SAME"), ((2, 1), 2, "VALID")])
def test_rows_of_a_convolution_are_its_patches(strides, dilation, padding):
    module = nn.Conv(4, (3, 2), strides=strides, kernel_dilation=dilation, padding=padding, use_bias=False)
    x = jnp.asarray(RNG.normal(size=(2, 7, 6, 3)), jnp.float32)
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    found = calibration.input_statistics(lambda p, y: module.apply({"params": p}, y), params, [(x,)])["kernel"]
    # A kernel that is 1 at one place of the window shows that feature of the patches.
    rows = []
    for place in range(18):
        kernel = np.zeros(18, np.float32)
        kernel[place] = 1
        shown = module.apply({"params": {"kernel": jnp.asarray(kernel.reshape(3, 2, 3, 1).repeat(4, -1))}}, x)
        rows.append(np.asarray(shown)[..., 0])
    _check(found, _reference(np.stack(rows, -1)))


def test_look_ups_are_counted_and_tied_tables_have_statistics():
    ids = jnp.array([[1, 2, 23], [0, 5, 5]])
    model = zoo.embed()
    found = calibration.input_statistics(model.apply, model.params, [(ids,), (ids,)])["embedding"]
    np.testing.assert_array_equal(found.rows, 2 * np.bincount(np.asarray(ids).reshape(-1), minlength=24))
    assert found.count == 12
    tied = zoo.tied_embed()
    found = calibration.input_statistics(tied.apply, tied.params, [(ids,)])
    embedding, dense = tied.params["Embed_0"]["embedding"], tied.params["Dense_0"]
    hidden = np.asarray(embedding, np.float64)[np.asarray(ids)] @ np.asarray(dense["kernel"], np.float64)
    _check(found["Embed_0"]["embedding"], _reference(hidden + np.asarray(dense["bias"], np.float64)))


def test_masked_rows_do_not_count_even_if_they_are_nan():
    w = {"token": jnp.asarray(RNG.normal(size=(4, 4)), jnp.float32), "pool": jnp.ones((4, 2))}
    x = RNG.normal(size=(3, 5, 4)).astype(np.float32)
    mask = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], np.float32)
    x[mask == 0] = np.nan
    mask[1, 0] = 0.5

    def apply(params, x, mask):
        hidden = x.reshape(-1, 4) @ params["token"]
        kept = jnp.where(mask[..., None] > 0, hidden.reshape(3, 5, 4), 0.0)
        return kept.sum(1) @ params["pool"]

    found = calibration.input_statistics(apply, w, [(x, mask)], row_mask=lambda x, mask: mask)
    _check(found["token"], _reference(np.nan_to_num(x), mask))
    hidden = np.nan_to_num(x).astype(np.float64) @ np.asarray(w["token"], np.float64)
    _check(found["pool"], _reference((hidden * (mask[..., None] > 0)).sum(1)[:2]))


def test_bfloat16_inputs_are_summed_in_float32():
    x = jnp.ones((4096, 2), jnp.bfloat16)
    found = calibration.input_statistics(lambda p, y: y @ p["w"], {"w": jnp.ones((2, 3), jnp.bfloat16)}, [(x,)])["w"]
    assert found.gram.dtype == jnp.float32
    np.testing.assert_array_equal(found.gram, np.full((2, 2), 4096.0))


def test_compressed_leaves_count_as_what_they_stand_for(mlp):
    params, batches = mlp
    packed, _ = jc.quantization.quantize(
        params, jc.quantization.QuantSpec(bits=8), select=tree.by_path("up"), layouts=None
    )
    found = calibration.input_statistics(_mlp, packed, batches)
    expected = calibration.input_statistics(_mlp, jc.materialize(packed), batches)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, expected)


def test_equal_on_one_and_on_eight_devices(mlp):
    params, _ = mlp
    x = jnp.asarray(RNG.normal(size=(16, 3, 5)), jnp.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    everywhere = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    found = calibration.input_statistics(_mlp, everywhere, [(placed,), (placed,)])
    expected = calibration.input_statistics(_mlp, params, [(x,), (x,)])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4), found, expected)
    assert len(found["up"].gram.sharding.device_set) == 8


def test_memory_is_predicted(mlp):
    params, batches = mlp
    sizes = statistics_nbytes(_mlp, params, batches[0])
    assert sizes == {"up": 4 * (1 + 25 + 15), "down": 4 * (1 + 49 + 21)}
    calibration.input_statistics(_mlp, params, batches, memory_limit=sum(sizes.values()))
    with pytest.raises(ValueError, match=r"would take 448 bytes.*largest are those of 'down', 284 bytes.*`select`"):
        calibration.input_statistics(_mlp, params, batches, memory_limit=447)


def test_mistakes_are_named(mlp):
    params, batches = mlp
    gather = calibration.input_statistics
    with pytest.raises(ValueError, match="`batches` is empty"):
        gather(_mlp, params, [])
    with pytest.raises(TypeError, match="Batches are tuples"):
        gather(_mlp, params, [batches[0][0]])
    with pytest.raises(ValueError, match=r"'idle': it is never multiplied .*'unused'"):
        gather(_mlp, params | {"idle": jnp.ones((2, 2))}, batches, select=tree.by_ndim(min=2))
    with pytest.raises(ValueError, match="'down': it got no rows"):
        gather(_mlp, params, batches, select=tree.by_path("down"), row_mask=lambda x: jnp.zeros(x.shape[:2]))
    with pytest.raises(
        ValueError, match=r"2 leaves:\n  'down': `row_mask` gave .*\n  'up': `row_mask` gave shape \(7,\)"
    ):
        gather(_mlp, params, batches, row_mask=lambda x: jnp.ones(7))
    with pytest.raises(ValueError, match="inputs of leaf 'up' hold NaN or Inf"):
        gather(_mlp, params, [(jnp.full((1, 5), jnp.nan),)])


def test_uses_without_statistics_are_named():
    gather, x = calibration.input_statistics, jnp.ones((2, 4))
    with pytest.raises(ValueError, match=r"'w': it is split along its inputs"):
        gather(lambda p, y: (y[:, :2] @ p["w"][:2], y[:, 2:] @ p["w"][2:]), {"w": jnp.ones((4, 3))}, [(x,)])
    with pytest.raises(ValueError, match=r"'w': A contraction runs over axes \[1\], the input axes are \(0,\)"):
        gather(lambda p, y: y @ p["w"] @ p["w"].T, {"w": jnp.ones((4, 3))}, [(x,)])


def test_a_leaf_that_only_shard_map_sees_is_an_error():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    inside = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    with pytest.raises(ValueError, match="'w': it is never multiplied by an input"):
        calibration.input_statistics(
            lambda p, x: inside(x, p["w"]), {"w": jnp.ones((4, 3))}, [(jnp.ones((8, 4)),)], select=tree.by_path("w")
        )


def test_a_leaf_that_only_a_condition_sees_is_an_error():
    def apply(params, x):
        return jax.lax.while_loop(lambda y: (y @ params["w"]).sum() > 1, lambda y: y / 2, x)

    with pytest.raises(ValueError, match="'w': it goes into the condition of a loop"):
        calibration.input_statistics(apply, {"w": jnp.ones((4, 3))}, [(jnp.ones((8, 4)),)])
