"""The sizes of a GPT-2, read off its parameters: pruned parameters say for themselves what is left."""

import dataclasses

from jaxcompress._src.models.decoder.shapes import layer_count, outputs_of
from jaxcompress._src.models.gpt2.config import GPT2Config
from jaxcompress._src.models.gpt2.parameters import parameter_shapes
from jaxcompress._src.models.leaves import check_parameters, flatten_params
from jaxcompress._src.types import Params


def resized_config(params: Params, config: GPT2Config) -> GPT2Config:
    """The config of parameters whose layers, heads, FFN columns or hidden features have become fewer.

    Heads are a third of the outputs of a layer's fused kernel over `config.head_size`. Every other leaf must agree with
    these, or else with `config`.

    Raises:
        ValueError: a leaf is missing, unknown, or disagrees; the message names it, what was found and expected.
    """
    leaves = flatten_params(params)
    prefix = "" if config.head == "decoder" else "transformer/"
    layers = layer_count(leaves, f"{prefix}h")
    paths = [f"{prefix}h/{layer}" for layer in range(layers)]
    norm = f"{prefix}ln_f/scale"
    resized = dataclasses.replace(
        config,
        hidden_size=leaves[norm].shape[0] if norm in leaves else config.hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=tuple(
            outputs_of(leaves, f"{path}/attn/c_attn/kernel", 3 * config.head_size) for path in paths
        ),
        intermediate_size=tuple(outputs_of(leaves, f"{path}/mlp/c_fc/kernel") for path in paths),
    )
    check_parameters(leaves, parameter_shapes(resized), f"a {config.head!r} GPT-2")
    return resized
