"""The sizes of a BERT, read off its parameters: pruned parameters say for themselves what is left."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jaxcompress._src.models.bert.config import BertConfig
from jaxcompress._src.models.bert.parameters import parameter_shapes, prefixed
from jaxcompress._src.models.leaves import check_parameters, flatten_params
from jaxcompress._src.types import Params


def config_from_params(params: Params, config: BertConfig) -> BertConfig:
    """The config of parameters whose layers, heads or FFN columns have become fewer.

    Heads are the outputs of a layer's query kernel over `config.head_size`; the FFN width is the outputs of its
    first feed-forward kernel. Every other leaf must agree with these, or else with `config`.

    Args:
        params: tree of anything with a `.shape`: arrays, `jax.ShapeDtypeStruct`, compressed arrays.
        config: everything that shapes do not tell: head, `head_size`, constants; and the sizes that cannot change.

    Returns:
        `config` with `num_hidden_layers`, `num_attention_heads` and `intermediate_size` of `params`.

    Raises:
        ValueError: a leaf is missing, unknown, or disagrees; the message names it, what was found and expected.

    Example:
        >>> import jax
        >>> from jaxcompress.models import make_module
        >>> config = BertConfig(
        ...     vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=(4, 1),
        ...     intermediate_size=(64, 48), head_size=8,
        ... )
        >>> ids = jax.ShapeDtypeStruct((1, 4), "int32")
        >>> params = jax.eval_shape(make_module(config).init, jax.random.key(0), ids)["params"]
        >>> full = dataclasses.replace(config, num_attention_heads=4, intermediate_size=64)
        >>> config_from_params(params, full) == config
        True
    """
    leaves = flatten_params(params)
    variant, prefix = config.variant, prefixed(config.variant.layers, config)
    layers = _layers(leaves, prefix)
    paths = [f"{prefix}/{i}" for i in range(layers)]
    recovered = dataclasses.replace(
        config,
        num_hidden_layers=layers,
        num_attention_heads=tuple(_heads(leaves, f"{path}/{variant.query}/kernel", config.head_size) for path in paths),
        intermediate_size=tuple(_outputs(leaves, f"{path}/{variant.ffn_input}/kernel") for path in paths),
    )
    check_parameters(leaves, parameter_shapes(recovered), f"a {config.head!r} {variant.title}")
    return recovered


def resized_config(params: Params, config: BertConfig) -> BertConfig:
    """As `config_from_params`, where hidden features may have become fewer too: as many as the embedding's norm has."""
    norm = prefixed("embeddings/LayerNorm/scale", config)
    leaves = flatten_params(params)
    if norm in leaves:
        config = dataclasses.replace(config, hidden_size=leaves[norm].shape[0])
    return config_from_params(params, config)


def _layers(leaves: Mapping[str, Any], prefix: str) -> int:
    numbers = {int(match[1]) for path in leaves if (match := re.match(rf"{prefix}/(\d+)/", path))}
    if not numbers or numbers != set(range(len(numbers))):
        raise ValueError(f"The layers under {prefix!r} must be numbered from 0 without gaps, found {sorted(numbers)}.")
    return len(numbers)


def _heads(leaves: Mapping[str, Any], path: str, head_size: int) -> int:
    outputs = _outputs(leaves, path)
    if outputs % head_size:
        raise ValueError(f"Leaf {path!r} has {outputs} outputs, expected a multiple of `head_size`, {head_size}.")
    return outputs // head_size


def _outputs(leaves: Mapping[str, Any], path: str) -> int:
    if path not in leaves:
        raise ValueError(f"Leaf {path!r} is missing from the params.")
    if len(shape := tuple(leaves[path].shape)) != 2:
        raise ValueError(f"Leaf {path!r} has shape {shape}, expected (inputs, outputs).")
    return shape[1]
