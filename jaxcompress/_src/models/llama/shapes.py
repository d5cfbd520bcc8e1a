"""The sizes of a Llama, read off its parameters: pruned parameters say for themselves what is left."""

import dataclasses

from jaxcompress._src.models.decoder.shapes import layer_count, outputs_of
from jaxcompress._src.models.leaves import check_parameters, flatten_params
from jaxcompress._src.models.llama.config import LlamaConfig
from jaxcompress._src.models.llama.parameters import parameter_shapes
from jaxcompress._src.types import Params


def resized_config(params: Params, config: LlamaConfig) -> LlamaConfig:
    """The config of parameters whose layers, heads, FFN columns or hidden features have become fewer.

    Heads are the outputs of a layer's query and key kernels over `config.head_size`. Every other leaf must agree with
    these, or else with `config`.

    Raises:
        ValueError: a leaf is missing, unknown, or disagrees; the message names it, what was found and expected.
    """
    leaves = flatten_params(params)
    prefix = "" if config.head == "decoder" else "model/"
    layers = layer_count(leaves, f"{prefix}layers")
    paths = [f"{prefix}layers/{layer}" for layer in range(layers)]

    def sizes(kernel: str, width: int = 1) -> tuple[int, ...]:
        return tuple(outputs_of(leaves, f"{path}/{kernel}/kernel", width) for path in paths)

    norm = f"{prefix}norm/weight"
    resized = dataclasses.replace(
        config,
        hidden_size=leaves[norm].shape[0] if norm in leaves else config.hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=sizes("self_attn/q_proj", config.head_size),
        num_key_value_heads=sizes("self_attn/k_proj", config.head_size),
        intermediate_size=sizes("mlp/up_proj"),
        sliding_window=config.sliding_window if layers == config.num_hidden_layers else _windows(config, layers),
    )
    check_parameters(leaves, parameter_shapes(resized), f"a {config.head!r} model of type {config.model_type!r}")
    return resized


def _windows(config: LlamaConfig, layers: int) -> tuple[int | None, ...]:
    """Of fewer layers: which are left, parameters do not say."""
    windows = set(config.sliding_window)
    if len(windows) > 1:
        raise ValueError(
            f"{layers} of {config.num_hidden_layers} layers are left, whose sliding windows differ: "
            "give the config `sliding_window` of those that are left."
        )
    return tuple(windows) * layers
