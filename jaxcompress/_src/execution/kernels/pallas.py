"""The Pallas kernels of TPUs and of Hopper GPUs, to be asked for by name, because nobody has timed them."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.arrays.input_quantized import InputQuantizedArray
from jaxcompress._src.arrays.packed import PackedArray
from jaxcompress._src.arrays.protocol import Multiply
from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.execution.kernels.input_codes import of_rows, why_not_codes
from jaxcompress._src.execution.kernels.kernel import Kernel, unless
from jaxcompress._src.execution.kernels.matmul import Matmul
from jaxcompress._src.types import is_compressed


def _parts(matmul: Matmul, bits: int) -> tuple[Any, Any, Any]:
    """Inputs, codes and scales as the kernels take them."""
    flat = matmul.flat_leaf()
    return matmul.flat_other(), flat.data.data if bits < 8 else flat.data, flat.scale


def _why_not(matmul: Matmul, *, bits: int, refusal: Callable[..., str | None]) -> str | None:
    leaf = matmul.leaf
    reason = unless(
        (not isinstance(leaf, QuantizedArray), "weights are no codes with scales, or inputs are quantized"),
        (matmul.order != "inputs first", "the inputs are not the first axes of the weight"),
    )
    if reason is not None:
        return reason
    flat = jax.eval_shape(matmul.flat_leaf)
    if flat is None:
        return "the stored codes are no matrix"
    packed = flat.data if isinstance(flat.data, PackedArray) else None
    reason = unless(
        (flat.bits != bits, f"codes of {flat.bits} bits, not of {bits}"),
        (not flat.plain_zeros() or flat.partial is not None, "zero points, levels or partial groups"),
        (
            bits < 8 and (packed is None or packed.axis != -2 or not packed.signed),
            "codes are not packed along the sums",
        ),
        (bits == 8 and is_compressed(flat.data), "codes are stored sparsely"),
        (
            jnp.promote_types(matmul.dtype, matmul.other.dtype) != matmul.other.dtype,
            f"results are {jnp.dtype(matmul.dtype)}, more than the {matmul.other.dtype} of the inputs",
        ),
    )
    return reason or refusal(*jax.eval_shape(lambda: _parts(matmul, bits)))


def _function(module: str, name: str) -> Callable[..., Any]:
    # Imported when it is asked for: Pallas takes as long as half of JAX.
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)


def _kernel(name: str, platform: str, module: str, bits: int) -> Kernel:
    def multiply(matmul: Matmul, multiply_part: Multiply) -> jax.Array:
        del multiply_part
        y = _function(module, f"int{bits}_matmul")(*_parts(matmul, bits))
        return matmul.unflattened(y.astype(matmul.dtype))

    return Kernel(
        name=name,
        platform=platform,
        multiply=multiply,
        why_not=lambda matmul: _why_not(matmul, bits=bits, refusal=_function(module, f"why_not_int{bits}")),
        error="the order of sums, and scales that are multiplied after them",
        default=False,
    )


def _why_not_w8a8(matmul: Matmul) -> str | None:
    leaf = matmul.leaf
    reason = unless(
        (not isinstance(leaf, InputQuantizedArray), "inputs are not quantized"),
        (matmul.order != "inputs first", "the inputs are not the first axes of the weight"),
    )
    if reason is not None:
        return reason
    if not leaf.is_whole_product(matmul.other, matmul.side, matmul.parameters):
        return "scales vary along the sums, or sums exceed int32"
    codes = jax.eval_shape(lambda x: leaf.input_codes(x, matmul.side, matmul.parameters), matmul.other)
    flat = jax.eval_shape(dataclasses.replace(matmul, leaf=leaf.weight).flat_leaf)
    if flat is None:
        return "the stored codes are no matrix"
    reason = why_not_codes(codes, matmul) or unless(
        (codes.zero_point is not None, "inputs have zero points"),
        (not flat.plain_zeros(), "weights have zero points"),
        (is_compressed(flat.data), "codes are packed or stored sparsely"),
    )
    if reason is not None:
        return reason
    x = jax.ShapeDtypeStruct((matmul.rows, matmul.inputs), jnp.int8)
    x_scale = jax.ShapeDtypeStruct((matmul.rows, 1), jnp.float32)
    return _function("tpu", "why_not_w8a8")(x, x_scale, flat.data, flat.scale)


def _w8a8(matmul: Matmul, multiply: Multiply) -> jax.Array:
    leaf = matmul.leaf

    def coded_product(codes: QuantizedArray) -> jax.Array:
        whole = dataclasses.replace(matmul, leaf=leaf.weight, other=codes.data)
        flat, x_scale = whole.flat_leaf(), of_rows(codes.scale.astype(jnp.float32), codes, matmul)
        y = _function("tpu", "w8a8_matmul")(whole.flat_other(), x_scale, flat.data, flat.scale)
        return matmul.unflattened(y)

    return leaf.dot(matmul.other, matmul.side, matmul.parameters, multiply=multiply, coded_product=coded_product)


KERNELS = (
    _kernel("tpu_int8", "tpu", "tpu", 8),
    _kernel("tpu_int4", "tpu", "tpu", 4),
    Kernel(name="tpu_w8a8", platform="tpu", multiply=_w8a8, why_not=_why_not_w8a8, error="none", default=False),
    _kernel("hopper_int8", "cuda", "mosaic_gpu", 8),
    _kernel("hopper_int4", "cuda", "mosaic_gpu", 4),
)
"""All of them; `execute` takes none unless it is asked for."""
