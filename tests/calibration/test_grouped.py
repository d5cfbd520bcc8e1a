"""Inputs of grouped convolutions and of ragged matmuls: each group, each expert has its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import calibration, clustering, lowrank, pruning, quantization, trace, tree

RNG = np.random.default_rng(0)
CHANNELS = 6
X = jnp.asarray(RNG.normal(size=(4, 7, CHANNELS)), jnp.float32)


def _convolution(groups):
    def apply(params, x):
        dims = ("NHC", "HIO", "NHC")
        return jax.lax.conv_general_dilated(
            x, params["kernel"], (1,), "SAME", dimension_numbers=dims, feature_group_count=groups
        )

    return apply


def _patches(x, group, groups):
    """(rows, 3 x channels of the group), in the order of the kernel."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (0, 0)))
    width = x.shape[2] // groups
    own = x[:, :, group * width : (group + 1) * width]
    return np.concatenate([own[:, k : k + x.shape[1] - 2] for k in range(3)], axis=2).reshape(-1, 3 * width)


CASES = {"grouped": (2, 4), "depthwise": (6, 6), "depthwise, two outputs each": (6, 12)}


@functools.cache
def _case(name):
    groups, outputs = CASES[name]
    params = {"kernel": jnp.asarray(RNG.normal(size=(3, CHANNELS // groups, outputs)), jnp.float32)}
    apply = _convolution(groups)
    statistics = calibration.input_statistics(apply, params, [(X[:2],), (X[2:],)])
    return groups, params, statistics, trace.layouts(apply, params, X)


@pytest.mark.parametrize("name", CASES)
def test_a_group_is_a_stack_entry_of_the_statistics(name):
    groups, _, statistics, layouts = _case(name)
    found = statistics["kernel"]
    assert (layouts["kernel"].kind, layouts["kernel"].groups) == ("conv", groups)
    for group in range(groups):
        rows = _patches(X, group, groups)
        assert found.count[group] == len(rows)
        np.testing.assert_allclose(found.gram[group], rows.T @ rows, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.absolute_max[group], np.abs(rows).max(0), rtol=1e-6)


METHODS = {
    "gptq": lambda p, s, at: quantization.gptq(p, s, quantization.QuantSpec(bits=3), layouts=at)[0],
    "gptq in blocks": lambda p, s, at: quantization.gptq(
        p, s, quantization.QuantSpec(bits=3, group_size=3), layouts=at
    )[0],
    "wanda": lambda p, s, at: pruning.wanda(p, s, sparsity=0.5, layouts=at)[0],
    "sparsegpt": lambda p, s, at: pruning.sparsegpt(p, s, sparsity=0.5, layouts=at)[0],
}


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("gptq in blocks", "grouped"),
        ("gptq", "depthwise"),
        ("wanda", "grouped"),
        ("sparsegpt", "grouped"),
    ],
)
def test_methods_treat_groups_as_kernels_of_their_own(name, kernel):
    groups, params, statistics, layouts = _case(kernel)
    found = jc.materialize(METHODS[name](params, statistics, layouts))["kernel"]
    each = params["kernel"].shape[2] // groups
    plain = {"kernel": trace.LeafLayout(kind="conv", input_axes=(0, 1), output_axes=(2,))}
    # All groups at once: as leaves of one tree.
    alone = {str(g): params["kernel"][..., g * each : (g + 1) * each] for g in range(groups)}
    own = {str(g): jax.tree.map(lambda part, g=g: part[g], statistics["kernel"]) for g in range(groups)}
    expected = jc.materialize(METHODS[name](alone, own, dict.fromkeys(alone, plain["kernel"])))
    for g in range(groups):
        np.testing.assert_allclose(
            found[..., g * each : (g + 1) * each], expected[str(g)], rtol=1e-5, atol=1e-6, err_msg=str(g)
        )


def test_importance_of_each_group():
    groups, params, statistics, layouts = _case("grouped")
    found = np.asarray(clustering.input_importance(params, statistics, layouts=layouts)["kernel"])
    for group in range(groups):
        means = (_patches(X, group, groups) ** 2).mean(0).reshape(3, CHANNELS // groups)
        for output in (2 * group, 2 * group + 1):
            np.testing.assert_allclose(found[..., output], means, rtol=1e-5)


def test_what_groups_cannot_have_is_said():
    _, params, statistics, layouts = _case("grouped")
    with pytest.raises(ValueError, match="'kernel' is the kernel of a grouped convolution, whose groups are rounded"):
        quantization.gptq(params, statistics, quantization.QuantSpec(bits=4, per_tensor=True), layouts=layouts)
    with pytest.raises(ValueError, match="'kernel' is the kernel of a grouped convolution, whose groups have inputs"):
        lowrank.activation_svd(params, statistics, rank=1, layouts=layouts, select=tree.by_path("kernel"))
    with pytest.raises(ValueError, match="'kernel': the groups of its convolution have no histogram in common"):
        calibration.input_statistics(_convolution(2), params, [(X,)], statistics=("histogram",))
    with pytest.raises(ValueError, match=r"has stack \[\] and .*give `layouts`"):
        pruning.wanda(params, statistics, sparsity=0.5)


def test_layers_of_grouped_convolutions():
    kernels = jnp.asarray(RNG.normal(size=(2, 3, 1, CHANNELS)) / 2, jnp.float32)
    apply = lambda p, x: jax.lax.scan(lambda y, w: (_convolution(CHANNELS)({"kernel": w}, y), None), x, p["w"])[0]  # noqa: E731
    found = calibration.input_statistics(apply, {"w": kernels}, [(X,)])["w"]
    y = X
    for layer in range(2):
        for group in range(CHANNELS):
            rows = _patches(y, group, CHANNELS)
            np.testing.assert_allclose(found.gram[layer, group], rows.T @ rows, rtol=1e-4, atol=1e-4)
        y = _convolution(CHANNELS)({"kernel": kernels[layer]}, y)
    assert found.count.shape == (2, CHANNELS)
