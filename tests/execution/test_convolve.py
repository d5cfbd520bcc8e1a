"""Convolutions with quantized kernels against a float64 sum over every place of the kernel."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress._src.execution.execute import fallbacks
from jaxcompress._src.quantization.round_to_nearest import quantize_array
from jaxcompress.arrays import sparsify
from jaxcompress.quantization import QuantSpec, quantize_inputs
from jaxcompress.trace import LeafLayout

KERNEL = LeafLayout(kind="conv", input_axes=(0, 1, 2), output_axes=(3,))
SPECS = {
    "8 bits": QuantSpec(bits=8),
    "4 bits, zero points": QuantSpec(bits=4, symmetric=False, scale_dtype="bfloat16"),
    "nf4": QuantSpec(format="nf4"),
    "one scale": QuantSpec(bits=3, per_tensor=True),
    "one bit": QuantSpec(bits=1),
}
OPTIONS = {
    "same": {"padding": "SAME"},
    "strided, dilated": {"window_strides": (2, 1), "padding": ((1, 0), (2, 2)), "rhs_dilation": (1, 2)},
    "transposed": {"padding": ((2, 2), (2, 2)), "lhs_dilation": (2, 2)},
    "grouped": {"padding": "VALID", "feature_group_count": 2},
    "depthwise": {"padding": "VALID", "feature_group_count": 4},
    "batch groups": {"padding": "VALID", "batch_group_count": 2},
}


def values(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def call(x, kernel, window_strides=(1, 1), **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, window_strides, dimension_numbers=numbers, **options)


def reference(x, kernel, window_strides=(1, 1), padding="VALID", feature_group_count=1, rhs_dilation=(1, 1)):
    """The definition, for explicit padding."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    if padding == "VALID":
        padding = ((0, 0), (0, 0))
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    per_group, outputs = kernel.shape[2], kernel.shape[3]
    reach = [(size - 1) * step + 1 for size, step in zip(kernel.shape[:2], rhs_dilation, strict=True)]
    sizes = [(n - r) // step + 1 for n, r, step in zip(x.shape[1:3], reach, window_strides, strict=True)]
    out = np.zeros((x.shape[0], *sizes, outputs))
    for i, j, o in itertools.product(range(kernel.shape[0]), range(kernel.shape[1]), range(outputs)):
        group = o // (outputs // feature_group_count)
        rows = i * rhs_dilation[0] + window_strides[0] * np.arange(sizes[0])
        columns = j * rhs_dilation[1] + window_strides[1] * np.arange(sizes[1])
        window = x[:, rows][:, :, columns][..., group * per_group : (group + 1) * per_group]
        out[..., o] += window @ kernel[i, j, :, o]
    return out


def test_every_format_under_every_option_needs_no_plain_kernel():
    x = values(2, 5, 6, 4)
    leaves, options = {}, {}
    for name, option in OPTIONS.items():
        per_group = 4 // option.get("feature_group_count", 1)
        for format_name, spec in SPECS.items():
            kernel = values(3, 2, per_group, 8, seed=1)
            leaves[f"{name}; {format_name}"] = quantize_array(kernel, spec, KERNEL)
            options[f"{name}; {format_name}"] = option
    sparse = sparsify(values(3, 2, 4, 8, seed=1), values(3, 2, 4, 8, seed=1) > 0)
    leaves["sparse"], options["sparse"] = quantize_array(sparse, QuantSpec(bits=4), KERNEL), {"padding": "VALID"}

    def apply(leaves, x):
        return {name: call(x, leaf, **options[name]) for name, leaf in leaves.items()}

    assert fallbacks(apply, leaves, x) == ()
    got = jax.jit(jc.execute(apply))(leaves, x)
    wanted = jax.jit(apply)(jc.materialize(leaves), x)
    for name, leaf in leaves.items():
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-5, atol=1e-5, err_msg=name)
        if not set(options[name]) & {"lhs_dilation", "batch_group_count"} and options[name]["padding"] != "SAME":
            exact = reference(x, leaf.materialize(), **options[name])
            np.testing.assert_allclose(got[name], exact, rtol=1e-5, atol=1e-5, err_msg=name)


def test_inputs_are_rounded_too_and_gradients_are_those_of_the_plain_kernel():
    x, kernel = values(2, 5, 5, 4), values(3, 3, 4, 8, seed=1)
    leaf = quantize_array(kernel, QuantSpec(bits=8), KERNEL)
    small, _ = quantize_inputs({"k": leaf}, QuantSpec(bits=8, per_tensor=True))
    apply = lambda p, x: call(x, p["k"], padding="VALID")  # noqa: E731
    assert fallbacks(apply, small, x) == ()
    step = float(jnp.abs(x).max()) / 127
    rounded = np.round(np.asarray(x, np.float64) / step) * step
    got = jc.execute(apply)(small, x)
    np.testing.assert_allclose(got, reference(rounded, leaf.materialize()), rtol=1e-4, atol=1e-4)

    def loss(run, scale, x):
        return jnp.sin(run({"k": jc.arrays.QuantizedArray(data=leaf.data, scale=scale, dtype=leaf.dtype)}, x)).sum()

    ours = jax.grad(lambda *a: loss(jc.execute(apply), *a), argnums=(0, 1))(leaf.scale, x)
    plain = jax.grad(lambda *a: loss(lambda p, x: apply(jc.materialize(p), x), *a), argnums=(0, 1))(leaf.scale, x)
    for found, wanted in zip(ours, plain, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_bfloat16_loses_no_more_than_the_plain_kernel():
    x, kernel = values(2, 5, 5, 16).astype(jnp.bfloat16), values(3, 3, 16, 8, seed=1)
    leaf = quantize_array(kernel, QuantSpec(bits=8), KERNEL)
    exact = reference(x, leaf.materialize())
    apply = lambda w, x: call(x, w.astype(jnp.bfloat16), padding="VALID")  # noqa: E731
    ours, plain = jc.execute(apply)(leaf, x), apply(leaf.materialize(), x)
    assert ours.dtype == plain.dtype == jnp.bfloat16
    lost = [np.abs(np.asarray(found, np.float64) - exact).max() for found in (ours, plain)]
    assert lost[0] <= 1.5 * lost[1] + 2.0**-8 * np.abs(exact).max()


@pytest.mark.parametrize(
    "leaf",
    [
        lambda w: quantize_array(w, QuantSpec(bits=4, group_size=4), KERNEL),
        lambda w: sparsify(w, w > 0),
        lambda w: quantize_array(sparsify(w, w > 0), QuantSpec(bits=4, symmetric=False), KERNEL),
    ],
)
def test_what_has_no_rule_is_still_reported(leaf):
    kernel, x = leaf(values(3, 2, 4, 8)), values(2, 5, 6, 4)
    apply = lambda w, x: call(x, w, padding="VALID")  # noqa: E731
    found = fallbacks(apply, kernel, x)
    assert [(entry.primitive, entry.shape) for entry in found] == [("conv_general_dilated", (3, 2, 4, 8))]
    wanted = reference(x, kernel.materialize())
    np.testing.assert_allclose(jc.execute(apply)(kernel, x), wanted, rtol=1e-4, atol=1e-4)
