"""`layer_by_layer` with the dense kernels, against float64 products; and which biases may be changed."""

import weakref
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress._src.calibration.layer_by_layer import layer_by_layer
from jaxcompress._src.calibration.sites import kernels_at_work, sites_of
from jaxcompress.models import BertConfig, GPT2Config, LlamaConfig, make_module
from jaxcompress.quantization import QuantSpec, correct_biases, reconstruct

RNG = np.random.default_rng(5)
X = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)
KERNEL, OTHER = (jnp.asarray(RNG.normal(size=(4, 4)), jnp.float32) for _ in "12")
BIAS = jnp.asarray(RNG.normal(size=4), jnp.float32)
SIZES = {
    "vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 6,
    "max_position_embeddings": 8,
}  # fmt: skip


def _sites(apply, paths, params, *inputs):
    found = []
    for stop in layer_by_layer(apply, paths, [params], [inputs]):
        rows = stop.rows(0, 0)
        found.append(SimpleNamespace(kernel=stop.kernel, bias=stop.bias, inputs=rows.inputs, residual=rows.residual))
    return found


def _product(x, w):
    return np.asarray(x, np.float64) @ np.asarray(w, np.float64)


def _shared(p, x):
    return jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"] + p["b"][None]


def _read_before(p, x):
    return jnp.tanh((x * p["b"][None]) @ p["w"] + p["b"][None]) @ p["v"]


def _read_after(p, x):
    return (jnp.tanh(x @ p["w"] + p["b"][None]) * p["b"][None]) @ p["v"]


def _added_twice(p, x):
    return jnp.tanh(x @ p["w"] + p["b"][None] + p["b"][None]) @ p["v"]


def _returned(p, x):
    return x @ p["w"] + p["b"][None], x @ p["v"], p["b"]


def _once_in_a_loop(p, x):
    loop = jax.lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h + p["b"][None]), x @ p["w"] + p["b"][None])
    return loop @ p["v"]


def _by_a_call(p, x):
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w + p["b"][None]))
    return layer(p["v"], layer(p["w"], x))


@pytest.mark.parametrize(
    "apply", [_shared, _read_before, _read_after, _added_twice, _returned, _once_in_a_loop, _by_a_call]
)
def test_a_bias_that_something_else_reads_stays(apply):
    params = {"w": KERNEL, "v": OTHER, "b": BIAS}
    assert [(site.kernel.path, site.bias) for site in _sites(apply, ["w", "v"], params, X)] == [
        ("w", None),
        ("v", None),
    ]
    found, _ = reconstruct(apply, params, [(X,)], QuantSpec(bits=4))
    np.testing.assert_array_equal(found["b"], BIAS)
    corrected, shifts = correct_biases(apply, params, found, [(X,)])
    assert shifts == {}
    np.testing.assert_array_equal(corrected["b"], BIAS)


def test_a_stack_of_biases_that_two_scans_read_stays():
    params = {name: jnp.stack([KERNEL, OTHER]) for name in "wv"} | {"b": jnp.stack([BIAS, -BIAS])}

    def apply(p, x):
        for name in "wv":
            x, _ = jax.lax.scan(lambda h, q: (jnp.tanh(h @ q[0] + q[1][None]), None), x, (p[name], p["b"]))
        return x

    sites = _sites(apply, ["w", "v"], params, X)
    assert [(site.kernel.name, site.bias) for site in sites] == [
        (f"{name}[{i}]", None) for name in "wv" for i in (0, 1)
    ]


@pytest.mark.parametrize("shape", [(6, 4), (4,)])
def test_one_number_for_all_outputs_is_no_bias(shape):
    params = {"w": KERNEL, "b": jnp.ones(1)}

    def apply(p, x):
        added = jnp.broadcast_to(p["b"], shape)
        return x @ p["w"] + (added if len(shape) == 2 else added[None])

    assert [site.bias for site in _sites(apply, ["w"], params, X)] == [None]
    found, _ = reconstruct(apply, params, [(X,)], QuantSpec(bits=8))
    np.testing.assert_array_equal(found["b"], params["b"])


def test_a_scan_over_layers_and_over_what_a_kernel_writes():
    params = {"w": KERNEL, "b": BIAS, "layers": jnp.stack([OTHER] * 6)}

    def apply(p, x):
        rows = x @ p["w"] + p["b"][None]
        return jax.lax.scan(lambda h, q: (h + q[0][None] @ q[1], None), jnp.zeros((1, 4)), (rows, p["layers"]))[0]

    sites = _sites(apply, ["w", "layers"], params, X)
    assert [site.kernel.name for site in sites] == ["w", *(f"layers[{i}]" for i in range(6))]
    rows = _product(X, KERNEL) + np.asarray(BIAS, np.float64)
    np.testing.assert_allclose(np.concatenate([site.inputs for site in sites[1:]]), rows, atol=1e-5)
    sums = np.cumsum(_product(rows, OTHER), axis=0) - _product(rows, OTHER)
    np.testing.assert_allclose(np.concatenate([site.residual for site in sites[1:]]), sums, atol=1e-5)


def test_a_reduction_of_its_own_kind_is_no_call():
    def apply(p, x):
        total = jax.lax.reduce(x @ p["w"], np.float32(0), lambda a, b: a + b * 1, (0,))
        return total[None] @ p["v"]

    inputs = _sites(apply, ["w", "v"], {"w": KERNEL, "v": OTHER}, X)[1].inputs
    np.testing.assert_allclose(inputs, _product(X, KERNEL).sum(axis=0, keepdims=True), atol=1e-5)


def test_a_shard_map_runs_as_a_whole():
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def apply(p, x):
        split = {"mesh": mesh, "in_specs": (spec("rows"), spec()), "out_specs": spec()}
        summed = jax.shard_map(lambda x, v: jax.lax.psum((x @ v).sum(axis=0, keepdims=True), "rows"), **split)
        return summed(x @ p["w"], p["v"]) @ p["u"]

    params = {"w": KERNEL, "v": OTHER, "u": KERNEL}
    assert [part.path for part in kernels_at_work(apply, params, X)] == ["w", "u"]
    wanted = _product(_product(X, KERNEL), OTHER).sum(axis=0, keepdims=True)
    np.testing.assert_allclose(_sites(apply, ["w", "u"], params, X)[1].inputs, wanted, atol=1e-4)
    with pytest.raises(ValueError, match="'v' is used as a whole inside a `shard_map`"):
        kernels_at_work(apply, params, X, paths=["v"])


def _kept_in_float32(p, x):
    return jnp.matmul(x.astype(jnp.bfloat16), p["w"].astype(jnp.bfloat16), preferred_element_type=jnp.float32)


def _cast_before_the_bias(p, x):
    return (x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(jnp.float32) + p["b"][None]


def _of_whole_numbers(p, x):
    x = jnp.round(3 * x).astype(jnp.int8)
    return jax.lax.dot(x, p["w"], preferred_element_type=jnp.float32) + p["b"][None]


def _to_whole_numbers(p, x):
    h = (3 * x @ p["w"]).astype(jnp.int32)
    return (h + jnp.arange(-12, 12).reshape(6, 4)).astype(jnp.float32)


@pytest.mark.parametrize("layer", [_kept_in_float32, _cast_before_the_bias, _of_whole_numbers, _to_whole_numbers])
def test_products_keep_the_dtypes_of_the_model(layer):
    params = {"w": KERNEL, "b": 100 + BIAS, "v": OTHER}
    sites = _sites(lambda p, x: layer(p, x) @ p["v"], ["w", "v"], params, X)
    np.testing.assert_allclose(sites[1].inputs, layer(params, X), rtol=1e-5, atol=1e-5)


def test_a_wide_bias_beside_a_narrow_kernel():
    """The models go on with the bias that is stored: rounded to bfloat16 it would be off by up to 0.25."""
    params = {"w": KERNEL.astype(jnp.bfloat16), "b": 100.2 + BIAS, "v": OTHER, "same": np.arange(3.0)}

    def apply(p, x):
        return jnp.sin((x.astype(jnp.bfloat16) @ p["w"]).astype(jnp.float32) + p["b"][None]) @ p["v"]

    found, info = reconstruct(apply, params, [(X,)], QuantSpec(bits=3))
    assert found["same"] is params["same"]
    assert found["b"].dtype == jnp.float32
    wanted, given = (np.float64(apply(tree, X)) for tree in (params, jc.materialize(found)))
    # What the last kernel reports is the error of the whole model.
    error = np.linalg.norm(given - wanted) / np.linalg.norm(wanted)
    assert info["v"].error == pytest.approx(error, rel=1e-2)


@pytest.mark.parametrize("reused", [False, True])
def test_what_else_reads_a_kernel_reads_what_it_became(reused):
    params = {"w": jnp.stack([KERNEL, OTHER]), "v": BIAS[:, None]}

    def apply(p, x):
        total = p["w"].sum()
        x = jnp.tanh(x * total if reused else x)
        return jnp.tanh(x @ p["w"][0]), jnp.tanh(x @ p["w"][1]), (x * total) @ p["v"]

    stops = []
    for stop in layer_by_layer(apply, ["w", "v"], [params], [(X,)]):
        stops.append((stop.kernel.name, stop.rows(0, 0).inputs))
        stop.replace(2 * stop.weights(0)[0])
    assert [name for name, _ in stops] == ["w[0]", "w[1]", "v"]
    x = np.tanh(np.float64(X) * (np.float64(params["w"]).sum() if reused else 1))
    np.testing.assert_allclose(stops[2][1], x * 2 * np.float64(params["w"]).sum(), rtol=1e-4, atol=1e-4)


def test_a_leaf_beside_what_a_kernel_writes():
    params = {"first": BIAS[None], "w": KERNEL, "v": OTHER}

    def apply(p, x):
        rows = jnp.concatenate([p["first"], x @ p["w"]])
        return jax.lax.scan(lambda h, row: (h + row, h), jnp.zeros(4), rows)[1] @ p["v"]

    assert [part.name for part in kernels_at_work(apply, params, X)] == ["w", "v"]
    inputs = _sites(apply, ["w", "v"], params, X)[1].inputs
    rows = np.concatenate([np.float64(BIAS)[None], _product(X, KERNEL)])
    np.testing.assert_allclose(inputs, np.cumsum(rows, axis=0) - rows, atol=1e-5)


def test_inputs_are_let_go_once_the_model_is_past_them():
    params = {"layers": jnp.stack([KERNEL, OTHER] * 2)}
    apply = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])[0]  # noqa: E731
    seen = []
    for stop in layer_by_layer(apply, ["layers"], [params], [(X,)]):
        # Rows in two axes are the value itself, not a copy.
        seen.append(weakref.ref(stop.rows(0, 0).inputs))
        if len(seen) == 4:
            assert [ref() is None for ref in seen[1:]] == [True, True, False]
    assert len(seen) == 4


def test_a_turned_stack_that_is_rounded_to_whole_numbers_has_no_kernels():
    params = {"w": jnp.round(jnp.stack([KERNEL, OTHER])), "v": OTHER}

    def apply(p, x):
        kernels = p["w"][::-1].astype(jnp.int8)
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w.astype(jnp.float32)), None), x, kernels)[0] @ p["v"]

    assert [part.name for part in kernels_at_work(apply, params, X)] == ["v"]
    np.testing.assert_allclose(
        _sites(apply, ["v"], params, X)[0].inputs, np.tanh(np.tanh(X @ params["w"][1]) @ params["w"][0]), atol=1e-5
    )


def _split_before_the_bias(p, x):
    return x + ((x.reshape(6, 4) @ p["w"]).reshape(x.shape) + p["b"][None, None])


def _split_after_the_bias(p, x):
    return x + (x.reshape(6, 4) @ p["w"] + p["b"][None]).reshape(x.shape)


def _merged_after_the_residual(p, x):
    return (x @ p["w"] + x).reshape(6, 4) + p["b"][None]


@pytest.mark.parametrize("layer", [_split_before_the_bias, _split_after_the_bias, _merged_after_the_residual])
def test_leading_axes_that_are_merged_and_split_keep_bias_and_residual(layer):
    params = {"w": KERNEL, "b": BIAS, "v": OTHER}
    x = X.reshape(2, 3, 4)
    first, last = _sites(lambda p, x: jnp.tanh(layer(p, x)) @ p["v"], ["w", "v"], params, x)
    assert first.bias.path == "b"
    np.testing.assert_array_equal(first.inputs, X)
    np.testing.assert_array_equal(first.residual, X)
    wanted = np.tanh(_product(X, KERNEL) + np.float64(BIAS) + np.float64(X))
    np.testing.assert_allclose(last.inputs, wanted, rtol=1e-5, atol=1e-5)


def test_rows_that_are_split_into_heads_end_where_they_are():
    """Outputs that are split are no rows of outputs any more: what is added to them is no residual of the kernel."""
    apply = lambda p, x: jnp.tanh((x @ p["w"]).reshape(6, 2, 2) + x.reshape(6, 2, 2)).reshape(6, 4) @ p["v"]  # noqa: E731
    assert [site.residual for site in _sites(apply, ["w", "v"], {"w": KERNEL, "v": OTHER}, X)] == [None, None]


@pytest.mark.parametrize(
    ("config", "writers"),
    [
        (BertConfig(**SIZES), {"attention/output/dense", "output/dense"}),
        (BertConfig(**SIZES, model_type="distilbert"), {"attention/out_lin", "ffn/lin2"}),
        (GPT2Config(**SIZES), {"attn/c_proj", "mlp/c_proj"}),
        (LlamaConfig(**SIZES, num_key_value_heads=1), {"self_attn/o_proj", "mlp/down_proj"}),
    ],
    ids=lambda each: getattr(each, "model_type", ""),
)
def test_sublayers_of_every_family_write_to_the_residual_stream(config, writers):
    """What makes up for the errors in that stream (`reconstruct`, `refit`) must find it."""
    module, ids = make_module(config), jnp.zeros((2, 3), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
    apply = lambda p, ids: module.apply({"params": p}, ids)  # noqa: E731
    paths = [part.path for part in kernels_at_work(apply, params, ids)]
    _, sites = sites_of(apply, params, (ids,), paths=paths)
    added = {site.kernel.path for site in sites if site.residual is not None}
    assert added == {path for path in paths if path.removesuffix("/kernel").endswith(tuple(writers))}
    assert len(added) == 4
