"""The table of families, and what every family can do."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcompress._src.models.bert.family import BERT, DISTILBERT, ROBERTA, XLM_ROBERTA
from jaxcompress._src.models.family import Config, Family, Head
from jaxcompress._src.models.gpt2.family import GPT2
from jaxcompress._src.models.llama.family import LLAMAS
from jaxcompress._src.types import Params
from jaxcompress._src.units.group import UnitGroup

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (BERT, ROBERTA, XLM_ROBERTA, DISTILBERT, GPT2, *LLAMAS)
}
"""`model_type` of a config.json -> family."""

_BRING_YOUR_OWN = (
    "Any other model needs no family: bring its own `apply(params, *inputs)`, which `jaxcompress.execute` and every "
    "method of the library take."
)


def family_named(model_type: Any) -> Family:
    """The family of a `model_type`.

    Raises:
        ValueError: there is none; names those that there are.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(map(repr, FAMILIES))
        raise ValueError(f"`model_type` is {model_type!r}; supported: {known}. {_BRING_YOUR_OWN}")
    return FAMILIES[model_type]


def family_of(model: Any) -> Family:
    """The family of a module, or of a config.

    Raises:
        ValueError: it is of none.
    """
    config = getattr(model, "config", model)
    for family in FAMILIES.values():
        # Families that differ by their configs only share the class of these.
        if isinstance(config, family.config) and getattr(config, "model_type", family.model_type) == family.model_type:
            return family
    known = ", ".join(map(repr, FAMILIES))
    raise ValueError(f"{type(model).__name__} is of no family of `jaxcompress.models` ({known}). {_BRING_YOUR_OWN}")


def head_of(module: nn.Module) -> Head:
    """What a module's head gives."""
    return family_of(module).heads[config_of(module).head]


def config_of(module: nn.Module) -> Config:
    """The config of a module of a family."""
    family_of(module)
    return module.config  # pyright: ignore[reportAttributeAccessIssue]


def max_tokens(model: Any) -> int:
    """Most tokens that a text may have for a module, or for a config."""
    return family_of(model).max_tokens(getattr(model, "config", model))


def make_module(config: Any, *, dtype: Any = jnp.float32) -> nn.Module:
    """The module of a config and its head.

    Args:
        config: of a family, such as `BertConfig`: sizes, constants and head.
        dtype: of the computation.

    Example:
        >>> from jaxcompress.models import BertConfig
        >>> config = BertConfig(
        ...     vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        ...     head="masked_lm",
        ... )
        >>> type(make_module(config)).__name__
        'BertForMaskedLM'
    """
    return family_of(config).make_module(config, dtype)


def unit_groups(config: Any, *, kinds: Sequence[str] | None = None) -> tuple[UnitGroup, ...]:
    """The units of a model: what can be removed as a whole.

    Args:
        config: of the module: `module.config`.
        kinds: of the units. By default those that are usually removed together: of a BERT the attention "heads" and
            the feed-forward "columns". It also has "attentions" and "ffns", its whole sublayers, and "hidden", the
            features of the residual stream.

    Returns:
        Groups for `structured.select_units` and `structured.shrink`, or for `gates.hard_concrete`.

    Raises:
        ValueError: the family has no such kind; names those it has.

    Example:
        >>> from jaxcompress.models import BertConfig
        >>> config = BertConfig(
        ...     vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
        ... )
        >>> [(group.name, group.count) for group in unit_groups(config)]
        [('encoder/layer/0/heads', 4), ('encoder/layer/0/columns', 64)]
    """
    family = family_of(config)
    kinds = family.default_units if kinds is None else kinds
    if unknown := [kind for kind in kinds if kind not in family.units]:
        known = ", ".join(map(repr, family.units))
        raise ValueError(f"A model of type {family.model_type!r} has no units {unknown[0]!r}; it has {known}.")
    return tuple(group for kind in kinds for group in family.units[kind](config))


def resized(module: nn.Module, params: Params) -> nn.Module:
    """The module for parameters that have become smaller: the same, with the sizes that `params` have.

    Args:
        module: of `make_module` or `from_pretrained`.
        params: what `structured.shrink` left of its parameters: fewer heads, FFN columns or hidden features.

    Returns:
        A module of the same class and dtype, whose config has the sizes of `params`.

    Raises:
        ValueError: a leaf is missing, unknown, or disagrees with the others; the message names it.

    Example:
        A student of half the heads and columns of its teacher, those with the most Fisher information:

        >>> import jax, jax.numpy as jnp
        >>> from jaxcompress import structured
        >>> from jaxcompress.models import BertConfig
        >>> config = BertConfig(
        ...     vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        ...     head="sequence_classification",
        ... )
        >>> module, ids, groups = make_module(config), jnp.array([[5, 3, 9], [2, 7, 4]]), unit_groups(config)
        >>> params = jax.jit(module.init)(jax.random.key(0), ids)["params"]
        >>> def loss(params, ids):
        ...     return -jax.nn.log_softmax(module.apply({"params": params}, ids)["logits"])[:, 1].mean()
        >>> scores = structured.fisher_unit_scores(structured.gate_gradients(loss, params, groups, [ids]))
        >>> keep = structured.select_units(scores, groups, params, shape={"heads": 2, "columns": 32}).keep
        >>> small = structured.shrink(params, groups, keep)
        >>> student = resized(module, small)
        >>> student.config.num_attention_heads, student.config.intermediate_size
        ((2,), (32,))
    """
    return module.clone(config=family_of(module).resized_config(params, config_of(module)))
