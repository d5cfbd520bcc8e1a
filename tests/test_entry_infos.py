"""Infos of stacked leaves: each entry's is that of the same method on the entry as a leaf of its own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import calibration, clustering, lowrank, pruning, quantization, trace
from jaxcompress._src.pruning.masks import magnitude_masks
from jaxcompress.quantization import QuantSpec

LAYERS, WIDTH = 3, 8
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(30, WIDTH)) @ RNG.normal(size=(WIDTH, WIDTH)), jnp.float32)
SPEC = QuantSpec(bits=3, group_size=4)
ASYMMETRIC = QuantSpec(bits=3, group_size=4, symmetric=False)
TWO_OF_FOUR = pruning.n_of_m(2, 4)


def _layer(x, w):
    return jnp.tanh(x @ w), None


def _scanned(params, x):
    """Layers along the second axis of the kernel."""
    x, _ = jax.lax.scan(_layer, x, jnp.moveaxis(params["w"], 1, 0))
    return x @ params["out"]


def _nested(params, x):
    """A scan over scans."""
    x, _ = jax.lax.scan(lambda x, ws: jax.lax.scan(_layer, x, ws), x, params["w"])
    return x @ params["out"]


def _convolution(x, w):
    return jax.lax.conv_general_dilated(
        x, w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"), feature_group_count=2
    )


def _convolutions(params, x):
    x, _ = jax.lax.scan(lambda x, w: (_convolution(x, w), None), x, params["w"])
    return x @ params["out"]


MODELS = {
    "scan": (_scanned, (WIDTH, LAYERS, WIDTH), X),
    "scan of scans": (_nested, (2, 3, WIDTH, WIDTH), X),
    "grouped convolutions": (_convolutions, (LAYERS, 3, WIDTH // 2, WIDTH), X.reshape(3, 10, WIDTH)),
}


@functools.cache
def _model(name):
    """Its parameters, statistics and layouts. The entries differ in size, so that their errors do not average out."""
    apply, shape, x = MODELS[name]
    rng = np.random.default_rng(1)
    params = {
        "w": jnp.asarray(rng.normal(size=shape) * rng.uniform(0.1, 1.0, size=shape), jnp.float32),
        "out": jnp.asarray(rng.normal(size=(WIDTH, 4)), jnp.float32),
    }
    return params, calibration.input_statistics(apply, params, [(x,)]), trace.layouts(apply, params, x)


def _entries(params, statistics, layouts):
    """Each entry of the kernel by its name, as a model of one leaf."""
    layout = layouts["w"]
    for index in np.ndindex(*(params["w"].shape[axis] for axis in layout.stack_axes)):
        where = dict(zip(layout.stack_axes, index, strict=True))
        entry = params["w"][tuple(where.get(axis, slice(None)) for axis in range(params["w"].ndim))]
        own = jax.tree.map(lambda part, index=index: part[index], statistics["w"])
        yield f"w[{','.join(map(str, index))}]", ({"w": entry}, {"w": own}, {"w": layout.entry})


def _tuned(params, statistics, layouts):
    masks = magnitude_masks(params, sparsity=0.5, pattern=TWO_OF_FOUR, layouts=layouts)
    return pruning.tune_masked(params, masks, statistics, layouts=layouts)[1]


def _measured(params, statistics, layouts):
    small, _ = quantization.quantize(params, SPEC, layouts=layouts)
    return quantization.rounding_errors(params, small, statistics, layouts=layouts)


def _with_residual(params, statistics, layouts):
    def compress(rest, _, at):
        return quantization.quantize(rest, SPEC, layouts=at)

    options = {"rank": 2, "statistics": statistics, "iterations": 1, "layouts": layouts}
    return lowrank.with_residual(params, compress, **options)[1]


def _weighed(method, spec):
    def run(params, statistics, layouts):
        importance = clustering.input_importance(params, statistics, layouts=layouts)
        return method(params, spec, importance=importance, layouts=layouts)[1]

    return run


METHODS = {
    "gptq": lambda p, s, at: quantization.gptq(p, s, SPEC, layouts=at)[1],
    "awq": lambda p, s, at: quantization.awq(p, s, SPEC, layouts=at)[1],
    "hqq": lambda p, s, at: quantization.hqq(p, ASYMMETRIC, layouts=at)[1],
    "hqq with exact zeros": lambda p, s, at: quantization.hqq(p, ASYMMETRIC, exact_zero=True, layouts=at)[1],
    "rounding_errors": _measured,
    "sparsegpt": lambda p, s, at: pruning.sparsegpt(p, s, sparsity=0.4, layouts=at)[1],
    "alps": lambda p, s, at: pruning.alps(p, s, sparsity=0.4, layouts=at)[1],
    "wanda": lambda p, s, at: pruning.wanda(p, s, sparsity=0.4, layouts=at)[1],
    "tune_masked": _tuned,
    "svd": lambda p, s, at: lowrank.svd(p, rank=2, layouts=at)[1],
    "svd that leaves all dense": lambda p, s, at: lowrank.svd(p, rank=dict.fromkeys(p), layouts=at)[1],
    "activation_svd": lambda p, s, at: lowrank.activation_svd(p, s, rank=2, layouts=at)[1],
    "fisher_svd": lambda p, s, at: lowrank.fisher_svd(p, jax.tree.map(jnp.square, p), rank=2, layouts=at)[1],
    "with_residual": _with_residual,
    "cluster": _weighed(clustering.cluster, clustering.CodebookSpec(values=4)),
    "cluster, unweighed": lambda p, s, at: clustering.cluster(p, clustering.CodebookSpec(values=4), layouts=at)[1],
    "additive_quantize": _weighed(
        clustering.additive_quantize, clustering.AdditiveSpec(length=4, tables=2, values=4, rounds=2)
    ),
}
GROUPED = ("gptq", "awq", "rounding_errors", "sparsegpt", "alps", "wanda", "tune_masked", "cluster")
CASES = [
    *((name, "scan") for name in METHODS),
    *((name, "scan of scans") for name in ("gptq", "wanda", "activation_svd", "cluster", "additive_quantize")),
    *((name, "grouped convolutions") for name in GROUPED),
]


def _check_equal(found, wanted):
    assert type(found) is type(wanted)
    for field, value in dataclasses.asdict(wanted).items():
        own = getattr(found, field)
        if value is None or isinstance(value, str):
            assert own == value, field
        else:
            np.testing.assert_allclose(own, value, rtol=3e-4, atol=1e-7, err_msg=field)


@pytest.mark.parametrize(("method", "model"), CASES)
def test_the_info_of_an_entry_is_that_of_the_entry_alone(method, model):
    params, statistics, layouts = _model(model)
    found = METHODS[method](params, statistics, layouts)
    alone = dict(_entries(params, statistics, layouts))
    assert sorted(found) == sorted(["out", *alone])
    for name, own in alone.items():
        infos = METHODS[method](*own)
        assert list(infos) == ["w"]
        _check_equal(found[name], infos["w"])
    assert method == "svd that leaves all dense" or len({found[name].error for name in alone}) == len(alone)


def test_the_error_of_an_entry_covers_all_groups_of_its_convolution():
    params, statistics, layouts = _model("grouped convolutions")
    small, info = quantization.gptq(params, statistics, QuantSpec(bits=2), layouts=layouts)
    x, plain = MODELS["grouped convolutions"][2], jc.materialize(small)["w"]
    for layer in range(LAYERS):
        outputs, changed = (np.asarray(_convolution(x, w[layer]), np.float64) for w in (params["w"], plain))
        wanted = np.linalg.norm(changed - outputs) / np.linalg.norm(outputs)
        assert info[f"w[{layer}]"].error == pytest.approx(wanted, rel=1e-3)
        assert info[f"w[{layer}]"].unseen_entries == 0
        x = jnp.asarray(outputs, jnp.float32)


def test_a_group_that_no_row_reached_is_not_an_entry():
    params, statistics, layouts = _model("grouped convolutions")
    seen = jnp.ones((LAYERS, 2)).at[0, 1].set(0.0).at[1].set(0.0)
    unseen = jax.tree.map(lambda part: part * seen.reshape(*seen.shape, *(1,) * (part.ndim - 2)), statistics["w"])
    with pytest.warns(UserWarning, match="No row of the calibration data reached 'w'"):
        _, info = pruning.wanda(params, statistics | {"w": unseen}, sparsity=0.5, layouts=layouts)
    inputs = 3 * WIDTH // 2
    found = [(info[f"w[{i}]"].unseen_inputs, info[f"w[{i}]"].unseen_entries) for i in range(LAYERS)]
    assert found == [(inputs, 0), (2 * inputs, 1), (0, 0)]
    assert [info[f"w[{i}]"].error is None for i in range(LAYERS)] == [False, True, False]


def test_a_copy_of_which_nothing_counts_has_an_error_all_the_same():
    params, _, layouts = _model("scan")
    h = {"w": jnp.ones((1, LAYERS, 1)).at[0, 1].set(0.0) * 1e-3, "out": None}
    spec = clustering.AdditiveSpec(length=4, tables=1, values=4)
    _, info = clustering.additive_quantize(params, spec, importance=h, layouts=layouts)
    _, plain = clustering.additive_quantize(params, spec, layouts=layouts)
    for name in plain:
        assert info[name].error == pytest.approx(plain[name].error, rel=1e-4)
