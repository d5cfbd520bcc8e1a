"""The format `pack-quantized` of compressed-tensors: integers in 32-bit words, and what `config.json` says of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxcompress._src.export.encoding import EncodedLeaves, form, linear_layer, written
from jaxcompress._src.export.info import CannotHoldError, ExportedLeaf
from jaxcompress._src.export.integers import IntegerRows, integer_rows, packed_words
from jaxcompress._src.models.hf.names import Parameter


class _Scheme(NamedTuple):
    """What linear layers of one entry of `config_groups` have in common; `group_size` is None for whole rows."""

    bits: int
    group_size: int | None
    symmetric: bool


def compressed_tensors(
    compressed: Mapping[str, Any], parameters: Mapping[str, Parameter], config: Any
) -> EncodedLeaves:
    """Quantized kernels as `pack-quantized`.

    Of a linear layer: `weight_packed` (O, ceil(I bits / 32)) holds code + 2^(bits - 1) (of asymmetric leaves, the
    unsigned code), the lowest bits first along I; `weight_scale` (O, G) float32; `weight_shape` [O, I]; and, of
    asymmetric leaves, `weight_zero_point` (ceil(O bits / 32), G), packed along O.

    Args:
        compressed: leaves by path.
        parameters: all parameters of the model, by path.
        config: of the model.
    """
    tensors, leaves, refusals = {}, {}, {}
    schemes: dict[_Scheme, list[str]] = {}
    for path, leaf in compressed.items():
        try:
            layer = linear_layer(path, parameters[path])
            if not parameters[path].transposed:
                raise CannotHoldError(
                    "transformers keeps it in a `Conv1D`, which compressed-tensors does not know: take format='gptq', "
                    "or `export.save_gguf`"
                )
            rows = integer_rows(leaf, inputs=0)
            bits = 4 if rows.bits <= 4 else 8
            arrays = _packed(rows, bits)
        except CannotHoldError as err:
            refusals[path] = str(err)
            continue
        scheme = _Scheme(bits, None if rows.whole_rows else rows.group_size, rows.zero_point is None)
        schemes.setdefault(scheme, []).append(layer)
        tensors |= {f"{layer}.{name}": written(array) for name, array in arrays.items()}
        leaves[path] = ExportedLeaf(form=form(*scheme), nbytes=sum(array.nbytes for array in arrays.values()))
    return EncodedLeaves(tensors, leaves, refusals, _settings(schemes, parameters, config))


def _packed(rows: IntegerRows, bits: int) -> dict[str, np.ndarray]:
    codes, zero_point = rows.unsigned(bits)
    arrays = {
        "weight_packed": packed_words(codes, bits=bits, axis=1),
        "weight_scale": np.ascontiguousarray(rows.scale),
        "weight_shape": np.array(codes.shape, np.int64),
    }
    if zero_point is not None:
        arrays["weight_zero_point"] = packed_words(zero_point, bits=bits, axis=0)
    return arrays


def _settings(schemes: Mapping[_Scheme, list[str]], parameters: Mapping[str, Parameter], config: Any) -> dict[str, Any]:
    quantized = {layer for layers in schemes.values() for layer in layers}
    linear = [parameter.tensor.removesuffix(".weight") for parameter in parameters.values() if parameter.transposed]
    ignored = [layer for layer in dict.fromkeys((*linear, *_hidden_layers(config))) if layer not in quantized]
    groups = {
        # One scheme for all linear layers but those ignored is what every library reads; several need their names.
        f"group_{number}": {
            "targets": ["Linear"] if len(schemes) == 1 else layers,
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": scheme.symmetric,
                "strategy": "channel" if scheme.group_size is None else "group",
                "group_size": scheme.group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
        for number, (scheme, layers) in enumerate(schemes.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


def _hidden_layers(config: Any) -> list[str]:
    """Linear layers that transformers has beside our parameters: tied heads, and a pooler that is not used."""
    if config.head == "causal_lm":
        return ["lm_head"]
    if (variant := getattr(config, "variant", None)) is None:
        return []
    if config.head == "masked_lm":
        return [variant.decoder.replace("/", ".")]
    return [] if config.has_pooler or config.head not in variant.pooled_heads else ["re:.*pooler.*"]
