"""Kernels of single backends: by Pallas' interpreter against float64, and lowered for their devices on this machine.

None has run on a device here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

import jaxcompress as jc
from jaxcompress._src.arrays.packed import pack
from jaxcompress._src.execution.kernels import mosaic_gpu, pallas, tpu
from jaxcompress._src.execution.kernels.matmul import Matmul
from jaxcompress.arrays import sparsify
from jaxcompress.quantization import QuantSpec, quantize, quantize_inputs

K, N = 512, 128
RNG = np.random.default_rng(0)


def _weight(bits, groups=1):
    """(stored codes, scale, values in float64)."""
    top = 2 ** (bits - 1)
    codes = RNG.integers(-top, top, (K, N)).astype(np.int8)
    scale = RNG.uniform(0.01, 0.1, (groups, N)).astype(np.float32)
    values = codes.astype(np.float64) * np.repeat(scale.astype(np.float64), K // groups, axis=0)
    stored = pack(codes, bits=4, axis=0).data if bits == 4 else jnp.asarray(codes)
    return stored, jnp.asarray(scale), values


def _float_matmul(bits):
    return tpu.int4_matmul if bits == 4 else tpu.int8_matmul


def _hopper_matmul(bits):
    return mosaic_gpu.int4_matmul if bits == 4 else mosaic_gpu.int8_matmul


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("groups", [1, 2, 16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 37])
def test_float_inputs(rows, bits, groups, dtype):
    stored, scale, values = _weight(bits, groups)
    x = jnp.asarray(RNG.normal(size=(rows, K)), dtype)
    found = _float_matmul(bits)(x, stored, scale, interpret=True)
    assert found.dtype == x.dtype
    wanted = np.asarray(x, np.float64) @ values
    # Of groups, the weight is rounded to the dtype, too.
    tolerance = {"float32": 1e-5, "bfloat16": 1e-2}[dtype] * np.abs(wanted).max()
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=tolerance)


def test_several_blocks_of_rows_and_inputs():
    codes = RNG.integers(-128, 128, (1536, 384)).astype(np.int8)
    scale = RNG.uniform(0.01, 0.1, (3, 384)).astype(np.float32)
    x = RNG.normal(size=(300, 1536)).astype(np.float32)
    found = tpu.int8_matmul(jnp.asarray(x), jnp.asarray(codes), jnp.asarray(scale), interpret=True)
    wanted = x.astype(np.float64) @ (codes * np.repeat(scale.astype(np.float64), 512, axis=0))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_numbers(dtype):
    stored, scale, values = _weight(8)
    x = RNG.integers(-128, 128, (5, K)).astype(np.int8)
    x_scale = RNG.uniform(0.01, 0.1, (5, 1)).astype(np.float32)
    found = tpu.w8a8_matmul(jnp.asarray(x), jnp.asarray(x_scale, dtype), stored, scale, interpret=True)
    assert found.dtype == dtype
    wanted = (x * np.asarray(jnp.asarray(x_scale, dtype), np.float64)) @ values
    tolerance = {"float32": 1e-6, "bfloat16": 1e-2}[dtype] * np.abs(wanted).max()
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=tolerance)


@pytest.mark.parametrize("bits", [8, 4])
def test_derivatives_are_those_of_the_plain_product(bits):
    stored, scale, values = _weight(bits, 2)
    x, weights = jnp.asarray(RNG.normal(size=(3, K)), jnp.float32), RNG.normal(size=(3, N))

    def loss(x, scale):
        return (_float_matmul(bits)(x, stored, scale, interpret=True) * weights.astype(np.float32)).sum()

    by_x, by_scale = jax.grad(loss, (0, 1))(x, scale)
    np.testing.assert_allclose(by_x, weights @ values.T, atol=1e-4)
    codes = values / np.repeat(np.asarray(scale, np.float64), K // 2, axis=0)
    wanted = (codes * (np.asarray(x, np.float64).T @ weights)).reshape(2, K // 2, N).sum(1)
    np.testing.assert_allclose(by_scale, wanted, atol=1e-5 * np.abs(wanted).max())
    tangent = jax.jvp(lambda x: _float_matmul(bits)(x, stored, scale, interpret=True), (x,), (x,))[1]
    np.testing.assert_allclose(tangent, np.asarray(x, np.float64) @ values, atol=1e-3)


def test_derivatives_by_the_scales_of_whole_numbers():
    stored, scale, values = _weight(8)
    x, rows = RNG.integers(-128, 128, (3, K)).astype(np.int8), jnp.ones((3, 1))
    by_rows = jax.grad(lambda rows: tpu.w8a8_matmul(jnp.asarray(x), rows, stored, scale, interpret=True).sum())(rows)
    wanted = (x @ values).sum(1, keepdims=True)
    np.testing.assert_allclose(by_rows, wanted, atol=1e-5 * np.abs(wanted).max())


def test_batched():
    (first, scale, values), (second, *_, others) = _weight(8), _weight(8)
    x = jnp.asarray(RNG.normal(size=(2, 3, K)), jnp.float32)
    matmul = jax.jit(lambda x, codes: tpu.int8_matmul(x, codes, scale, interpret=True))
    wanted = np.asarray(x, np.float64) @ values
    np.testing.assert_allclose(jax.vmap(matmul, (0, None))(x, first), wanted, atol=1e-4 * np.abs(wanted).max())
    found = jax.vmap(matmul)(x, jnp.stack([first, second]))
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-4 * np.abs(wanted).max())
    del others


CALLS = {
    "int8": (tpu.int8_matmul, [((37, 4096), "bfloat16"), ((4096, 1024), "int8"), ((1, 1024), "float32")]),
    "int8 g128": (tpu.int8_matmul, [((37, 4096), "bfloat16"), ((4096, 1024), "int8"), ((32, 1024), "float32")]),
    "int4": (tpu.int4_matmul, [((37, 4096), "float32"), ((2048, 1024), "uint8"), ((1, 1024), "float32")]),
    "int4 g32": (tpu.int4_matmul, [((37, 4096), "bfloat16"), ((2048, 1024), "uint8"), ((128, 1024), "bfloat16")]),
    "w8a8": (
        tpu.w8a8_matmul,
        [((37, 4096), "int8"), ((37, 1), "bfloat16"), ((4096, 1024), "int8"), ((1, 1024), "float32")],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_lowered_for_a_tpu(name):
    matmul, shapes = CALLS[name]
    exported = jax.export.export(jax.jit(matmul), platforms=["tpu"])(*(jax.ShapeDtypeStruct(*each) for each in shapes))
    assert exported.mlir_module().count("tpu_custom_call") == 1


def _whole_numbers(w, *, inputs=None, **spec):
    params, _ = quantize({"w": w}, QuantSpec(**{"bits": 8} | spec))
    return quantize_inputs(params, QuantSpec(**{"bits": 8} | (inputs or {})))[0]


def _multiplied(params, x):
    return x @ params["w"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_numbers_of_leaves_are_those_of_the_plain_product(dtype, monkeypatch):
    params = _whole_numbers(jnp.asarray(RNG.normal(size=(256, 128)), dtype))
    x = jnp.asarray(RNG.normal(size=(2, 5, 256)), dtype)
    numbers = {"dimension_numbers": (((2,), (0,)), ((), ())), "precision": None, "preferred_element_type": None}
    matmul = Matmul(leaf=params["w"], other=x, side=1, parameters=numbers | {"out_sharding": None})
    (kernel,) = (each for each in pallas.KERNELS if each.name == "tpu_w8a8")
    assert kernel.why_not(matmul) is None
    interpreted = functools.partial(tpu.w8a8_matmul, interpret=True)
    monkeypatch.setattr(pallas, "_function", lambda module, name: interpreted)
    found, wanted = kernel.multiply(matmul, jnp.matmul), jc.execute(_multiplied, kernels=())(params, x)
    assert found.dtype == wanted.dtype
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(wanted, np.float32), rtol=1e-6)


def test_whole_numbers_of_leaves_are_lowered_for_a_tpu():
    params, x = _whole_numbers(jnp.ones((256, 128))), jnp.ones((37, 256))
    multiply = jax.jit(jc.execute(_multiplied, kernels=("tpu_w8a8",)))
    assert jax.export.export(multiply, platforms=["tpu"])(params, x).mlir_module().count("tpu_custom_call") == 1


W = jnp.asarray(RNG.normal(size=(256, 128)), jnp.float32)


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        (quantize({"w": W}, QuantSpec(bits=8))[0], "inputs are not quantized"),
        (_whole_numbers(W, group_size=32), "scales vary along the sums, or sums exceed int32"),
        (_whole_numbers(W, inputs={"symmetric": False}), "inputs have zero points"),
        (_whole_numbers(W, symmetric=False), "weights have zero points"),
        (_whole_numbers(W, bits=4), "codes are packed or stored sparsely"),
        (_whole_numbers(sparsify(W, W > 0)), "codes are packed or stored sparsely"),
        (_whole_numbers(W[:, :100]), "N must be a multiple of 128, got 100"),
    ],
)
def test_reasons_against_whole_numbers(params, reason):
    planned = jc.execution.plan(_multiplied, params, jnp.ones((8, 256)), kernels=("tpu_w8a8",), platform="tpu")
    assert planned.matmuls[0].refused == {"tpu_w8a8": reason}


def test_sparse_codes_are_none_that_a_kernel_takes():
    params, _ = quantize({"w": sparsify(W, W > 0)}, QuantSpec(bits=8))
    planned = jc.execution.plan(_multiplied, params, jnp.ones((8, 256)), kernels=("tpu_int8",), platform="tpu")
    assert planned.matmuls[0].refused == {"tpu_int8": "codes are stored sparsely"}


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "groups", "dtype", "reason"),
    [
        (3, 512, 128, 1, "float16", "x must be float32 or bfloat16, got float16"),
        (3, 384, 128, 1, "float32", "K must be a multiple of 256, got 384"),
        (3, 512, 100, 1, "float32", "N must be a multiple of 128, got 100"),
        (3, 512, 128, 32, "float32", "groups must be multiples of 32, got 16"),
        (3, 768, 128, 8, "float32", "groups must divide, or be divided by"),
        (3, 512, 128, 16, "float32", None),
    ],
)
def test_reasons(rows, inputs, outputs, groups, dtype, reason):
    x, scale = jax.ShapeDtypeStruct((rows, inputs), dtype), jax.ShapeDtypeStruct((groups, outputs), jnp.float32)
    codes = jax.ShapeDtypeStruct((inputs, outputs), jnp.int8)
    packed = jax.ShapeDtypeStruct((inputs // 2, outputs), jnp.uint8)
    for found in (tpu.why_not_int8(x, codes, scale), tpu.why_not_int4(x, packed, scale)):
        assert (found is None) if reason is None else found.startswith(reason)
    if reason is not None:
        with pytest.raises(ValueError, match="No TPU kernel"):
            jax.eval_shape(tpu.int8_matmul, x, codes, scale)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bits", [8, 4])
def test_hopper(bits, groups):
    stored, scale, values = _weight(bits, groups)
    x = jnp.asarray(RNG.normal(size=(67, K)), jnp.bfloat16)
    found = _hopper_matmul(bits)(x, stored, scale, interpret=InterpretGPUParams())
    assert found.dtype == jnp.bfloat16
    wanted = np.asarray(x, np.float64) @ values
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=1e-2 * np.abs(wanted).max())


def test_hopper_derivatives_and_batches():
    stored, scale, values = _weight(8, 2)
    x = jnp.asarray(RNG.normal(size=(2, 3, K)), jnp.bfloat16)

    def matmul(x, scale):
        return mosaic_gpu.int8_matmul(x, stored, scale, interpret=InterpretGPUParams())

    wanted = np.asarray(x, np.float64) @ values
    for found in (jax.vmap(matmul, (0, None))(x, scale), jax.vmap(matmul)(x, jnp.stack([scale, scale]))):
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=1e-2 * np.abs(wanted).max())
    by_x, by_scale = jax.grad(lambda x, scale: matmul(x, scale).astype(jnp.float32).sum(), (0, 1))(x[0], scale)
    np.testing.assert_allclose(np.asarray(by_x, np.float64), np.tile(values.sum(1), (3, 1)), atol=1.5)
    codes = values / np.repeat(np.asarray(scale, np.float64), K // 2, axis=0)
    wanted = (codes * np.asarray(x[0], np.float64).sum(0)[:, None]).reshape(2, K // 2, N).sum(1)
    np.testing.assert_allclose(by_scale, wanted, atol=2e-2 * np.abs(wanted).max())


@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize("bits", [8, 4])
def test_lowered_for_a_gpu(bits, groups):
    """To the Mosaic GPU dialect with the layouts of all registers; what compiles that is not on this machine."""
    shapes = (
        [(37, 2048), "bfloat16"],
        [(2048 * bits // 8, 256), "int8" if bits == 8 else "uint8"],
        [(groups, 256), "float32"],
    )
    check = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    export = jax.export.export(jax.jit(_hopper_matmul(bits)), platforms=["cuda"], disabled_checks=[check])
    assert export(*(jax.ShapeDtypeStruct(*each) for each in shapes)).mlir_module().count("@mosaic_gpu_v2") == 1


@pytest.mark.parametrize(
    ("dtype", "inputs", "outputs", "groups", "reason"),
    [
        ("float32", 512, 128, 1, "x must be bfloat16, got float32"),
        ("bfloat16", 480, 128, 1, "K must be a multiple of"),
        ("bfloat16", 512, 64, 1, "N must be a multiple of 128, got 64"),
        ("bfloat16", 512, 128, 16, "groups must be multiples of"),
        ("bfloat16", 512, 128, 4, None),
    ],
)
def test_hopper_reasons(dtype, inputs, outputs, groups, reason):
    x, scale = jax.ShapeDtypeStruct((3, inputs), dtype), jax.ShapeDtypeStruct((groups, outputs), jnp.float32)
    codes = jax.ShapeDtypeStruct((inputs, outputs), jnp.int8)
    packed = jax.ShapeDtypeStruct((inputs // 2, outputs), jnp.uint8)
    for found in (mosaic_gpu.why_not_int8(x, codes, scale), mosaic_gpu.why_not_int4(x, packed, scale)):
        assert (found is None) if reason is None else found.startswith(reason)
