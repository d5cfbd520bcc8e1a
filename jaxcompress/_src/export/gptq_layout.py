"""The layout of GPTQ's files: codes packed along the inputs, zero points less 1, scales in float16."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxcompress._src.export.encoding import EncodedLeaves, form, linear_layer, written
from jaxcompress._src.export.info import CannotHoldError, ExportedLeaf, largest_difference
from jaxcompress._src.export.integers import IntegerRows, float16_scales, integer_rows, packed_words
from jaxcompress._src.models.hf.names import Parameter
from jaxcompress._src.models.hf.write import TensorToWrite

_BITS = (2, 3, 4, 8)


def gptq_layout(compressed: Mapping[str, Any], parameters: Mapping[str, Parameter], config: Any) -> EncodedLeaves:
    """Quantized kernels in the layout of GPTQ ("gptq", which some call v1).

    weight[i, o] = scales[g_idx[i], o] (code[i, o] - (qzero[g_idx[i], o] + 1)), of unsigned codes and zero points:
    `qweight` (I bits / 32, O) packed along I and `qzeros` (G, O bits / 32) packed along O, int32, the lowest bits
    first; `scales` (G, O) float16; `g_idx` (I,) int32. Symmetric codes have the zero point 2^(bits - 1).

    Args:
        compressed: leaves by path.
        parameters: all parameters of the model, by path.
        config: of the model.
    """
    kernels, refusals = {}, {}
    for path, leaf in compressed.items():
        try:
            layer = linear_layer(path, parameters[path])
            kernels[path] = layer, integer_rows(leaf, inputs=0)
        except CannotHoldError as err:
            refusals[path] = str(err)
    rows = [each for _, each in kernels.values()]
    bits = next(bits for bits in _BITS if bits >= max((each.bits for each in rows), default=0))
    # Whole rows are groups of any size that divides them.
    size = None if all(each.whole_rows for each in rows) else math.gcd(*(each.group_size for each in rows))
    tensors: dict[str, TensorToWrite] = {}
    leaves: dict[str, ExportedLeaf] = {}
    for path, (layer, each) in kernels.items():
        grouped = each if size is None else each.with_groups_of(size)
        try:
            arrays = _packed(grouped, bits)
        except CannotHoldError as err:
            refusals[path] = str(err)
            continue
        tensors |= {f"{layer}.{name}": written(array) for name, array in arrays.items()}
        rounded = grouped.with_scale(arrays["scales"].T)
        leaves[path] = ExportedLeaf(
            form=form(bits, size, each.zero_point is None),
            nbytes=sum(array.nbytes for array in arrays.values()),
            rounding=largest_difference(rounded.values(), grouped.values()),
        )
    symmetric = all(kernels[path][1].zero_point is None for path in leaves)
    return EncodedLeaves(tensors, leaves, refusals, _settings(bits, size, symmetric, leaves, parameters, config))


def _packed(rows: IntegerRows, bits: int) -> dict[str, np.ndarray]:
    codes, zero_point = rows.unsigned(bits)
    outputs, inputs = codes.shape
    for name, count in (("inputs", inputs), ("outputs", outputs)):
        if count * bits % 32:
            raise CannotHoldError(f"{count} {name} of {bits} bits do not fill whole words of 32 bits")
    if zero_point is None:
        zero_point = np.full(rows.scale.shape, 2 ** (bits - 1), np.uint8)
    if (zero_point == 0).any():
        raise CannotHoldError("it has zero points of 0; the layout holds the zero point less 1")
    return {
        "qweight": packed_words(codes.T, bits=bits, axis=0),
        "qzeros": packed_words((zero_point - 1).T, bits=bits, axis=1),
        "scales": np.ascontiguousarray(float16_scales(rows.scale).T),
        "g_idx": (np.arange(inputs) // max(rows.group_size, 1)).astype(np.int32),
    }


def _settings(
    bits: int,
    size: int | None,
    symmetric: bool,
    leaves: Mapping[str, ExportedLeaf],
    parameters: Mapping[str, Parameter],
    config: Any,
) -> dict[str, Any]:
    """With `dynamic`, by which GPTQModel and vLLM know the layers that are not quantized."""
    layers = {path: parameter.tensor.removesuffix(".weight") for path, parameter in parameters.items()}
    plain = [layer for path, layer in layers.items() if path.endswith("/kernel") and path not in leaves]
    head = any(layers[path] == "lm_head" for path in leaves)
    dynamic = {f"-:^{layer.replace('.', r'[.]')}$": {} for layer in plain if layer != "lm_head"}
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": -1 if size is None else size,
        "desc_act": False,
        "static_groups": False,
        "sym": symmetric,
        "lm_head": head,
        "true_sequential": False,
        "checkpoint_format": "gptq",
    } | ({"dynamic": dynamic} if dynamic else {})
