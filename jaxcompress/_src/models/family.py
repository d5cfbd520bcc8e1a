"""What a family of models must say, to be read, written, shrunk and compressed by a recipe."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import flax.linen as nn

from jaxcompress._src.models.hf.names import Parameter, StoredTensor
from jaxcompress._src.types import Params, Selector
from jaxcompress._src.units.group import UnitGroup

Answer: TypeAlias = Literal["vector", "classes", "tokens"]
"""What a model is asked for: a vector or classes for each text, or a token at each position."""


@runtime_checkable
class Config(Protocol):
    """What everything but the family itself reads from a config: a frozen, hashable dataclass."""

    head: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    num_labels: int
    id2label: tuple[str, ...]
    initializer_range: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """What a family gives with one of its heads.

    Attributes:
        description: in words, such as "a classifier".
        answer: "classes": `logits` (B, classes). "tokens": `logits` (B, L, vocabulary). "vector": hidden states alone,
            from which a vector for each text is pooled.
        architectures: classes of Hugging Face that have this head; the first is written.
        outputs: names of the outputs that a distillation can compare, beside `hidden_states`.
        causal: whether tokens are those that come next: what is given at a position has not seen the one after it.
    """

    description: str
    answer: Answer
    architectures: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    causal: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models, all functions pure.

    Attributes:
        model_type: as `config.json` names it. Families that share the class of their configs have it there, too.
        prefix: first component of the parameters' paths where there is a head, such as `bert`; files spell it or not.
        config: class of the configs.
        heads: by the name that a config's `head` has.
        config_from_settings: `(settings, head) -> config`: what a parsed `config.json` describes; without a head, by
            its `architectures`. Raises a `ValueError` that names what is not supported.
        settings_from_config: `config -> settings`: what `config_from_settings` makes the same config of.
        make_module: `(config, dtype) -> module` that holds its `config` and is called as `(input_ids, attention_mask,
            *, deterministic, output_hidden_states)`. It gives a dict, with names as in transformers:
            `last_hidden_state` (B, L, D); `hidden_states`, if asked for, of the embedding and of each layer; and the
            `outputs` of its head.
        parameters: `config -> parameters by path`: their shapes, and where they are in files.
        resized_config: `(params, config) -> config` of parameters that have become smaller.
        units: kind -> `config -> unit groups` of that kind: what can be removed as a whole.
        default_units: kinds that own no weight together, and go together.
        head_components: first components of paths, without the prefix, that belong to heads: files may have them or
            not.
        check_tensors: `(tensors by path without prefix, config) -> tensors`, without second copies of tied weights.
        unloadable: `config -> reason` why transformers cannot load such a shape; empty if it can.
        parts: name -> selector: in which parts of a model its bytes are counted.
        max_tokens: `config -> most tokens` that a text may have.
    """

    model_type: str
    prefix: str
    config: type
    heads: Mapping[str, Head]
    config_from_settings: Callable[[Mapping[str, Any], str | None], Any]
    settings_from_config: Callable[[Any], dict[str, Any]]
    make_module: Callable[[Any, Any], nn.Module]
    parameters: Callable[[Any], Mapping[str, Parameter]]
    resized_config: Callable[[Params, Any], Any]
    units: Mapping[str, Callable[[Any], Sequence[UnitGroup]]]
    default_units: tuple[str, ...]
    head_components: tuple[str, ...] = ()
    check_tensors: Callable[[Mapping[str, StoredTensor], Any], Mapping[str, StoredTensor]] = lambda tensors, _: tensors
    unloadable: Callable[[Any], str] = lambda _: ""
    parts: Mapping[str, Selector] | None = None
    max_tokens: Callable[[Any], int] = lambda config: config.max_position_embeddings
