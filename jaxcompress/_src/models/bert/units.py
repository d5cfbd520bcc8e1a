"""The units of a BERT, or of one of its variants: what can be removed as a whole."""

import dataclasses

from jaxcompress._src.models.bert.config import BertConfig
from jaxcompress._src.models.bert.parameters import parameter_shapes, prefixed
from jaxcompress._src.units.group import UnitGroup, UnitSlices


def bert_head_units(config: BertConfig) -> tuple[UnitGroup, ...]:
    """The attention heads of every layer that has some, one group for each layer.

    A head owns its columns of the query, key and value kernels, their biases, and its rows of the output kernel, which
    a gate multiplies. Groups are called `<layer>/heads`, of kind `heads`.

    Example:
        >>> config = BertConfig(
        ...     vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=(4, 0),
        ...     intermediate_size=64, head_size=8,
        ... )
        >>> [(group.name, group.count) for group in bert_head_units(config)]
        [('encoder/layer/0/heads', 4)]
    """
    variant, groups = config.variant, []
    for path, heads, _ in _layers(config):
        slices = [
            UnitSlices(path=f"{path}/{name}/{leaf}", axis=axis, width=config.head_size)
            for name in (variant.query, variant.key, variant.value)
            for leaf, axis in (("kernel", 1), ("bias", 0))
        ]
        output = f"{path}/{variant.attention_output}/kernel"
        slices.append(UnitSlices(path=output, axis=0, width=config.head_size, gated=True))
        if heads:
            groups.append(UnitGroup(name=f"{path}/heads", kind="heads", count=heads, slices=tuple(slices)))
    return tuple(groups)


def bert_column_units(config: BertConfig) -> tuple[UnitGroup, ...]:
    """The columns of the feed-forward network of every layer that has some, one group for each layer.

    A column is one output of the first feed-forward kernel, its bias, and the row of the second kernel that reads it,
    which a gate multiplies. Groups are called `<layer>/columns`, of kind `columns`.

    Example:
        >>> config = BertConfig(
        ...     vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
        ... )
        >>> [(group.name, group.count) for group in bert_column_units(config)]
        [('encoder/layer/0/columns', 64)]
    """
    variant, groups = config.variant, []
    for path, _, width in _layers(config):
        slices = (
            UnitSlices(path=f"{path}/{variant.ffn_input}/kernel", axis=1),
            UnitSlices(path=f"{path}/{variant.ffn_input}/bias", axis=0),
            UnitSlices(path=f"{path}/{variant.ffn_output}/kernel", axis=0, gated=True),
        )
        if width:
            groups.append(UnitGroup(name=f"{path}/columns", kind="columns", count=width, slices=slices))
    return tuple(groups)


def bert_attention_units(config: BertConfig) -> tuple[UnitGroup, ...]:
    """The attention sublayers: one group with one unit for each layer, of kind `attentions`.

    A unit owns all of its sublayer but the norm. Removing it leaves 0 heads and an output bias of zeros: exactly the
    masked model, in which the residual and its norm stay. A whole layer is its two sublayers; its two norms stay too,
    for in this post-norm model leaving them out would be another function.

    Example:
        >>> config = BertConfig(
        ...     vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        ... )
        >>> [(group.name, group.kind, group.count) for group in bert_attention_units(config)]
        [('encoder/attentions', 'attentions', 2)]
    """
    variant = config.variant
    return _sublayers(config, "attentions", [variant.query, variant.key, variant.value], variant.attention_output)


def bert_ffn_units(config: BertConfig) -> tuple[UnitGroup, ...]:
    """The feed-forward sublayers: one group with one unit for each layer, of kind `ffns`; see `bert_attention_units`.

    Example:
        >>> config = BertConfig(
        ...     vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        ... )
        >>> [(group.name, group.kind, group.count) for group in bert_ffn_units(config)]
        [('encoder/ffns', 'ffns', 2)]
    """
    return _sublayers(config, "ffns", [config.variant.ffn_input], config.variant.ffn_output)


def bert_hidden_units(config: BertConfig) -> tuple[UnitGroup, ...]:
    """The width of the residual stream, the same in every layer: one group of `hidden_size` units, of kind `hidden`.

    A unit owns one feature of the embeddings, of every norm, of what reads the stream and of what writes to it; gates
    multiply what writes. The masked model is not exactly the shrunk one: the statistics of the norms are taken over
    all features when some are zero, and over fewer once they are gone.

    Example:
        >>> config = BertConfig(
        ...     vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        ... )
        >>> [(group.name, group.count, len(group.slices)) for group in bert_hidden_units(config)]
        [('hidden', 32, 32)]
    """
    wider = parameter_shapes(dataclasses.replace(config, hidden_size=config.hidden_size + 1))
    slices = [
        # What reads the stream has it along the inputs of its kernel.
        UnitSlices(path=path, axis=axis, gated=not (path.endswith("/kernel") and axis == 0))
        for path, shape in parameter_shapes(config).items()
        for axis, size in enumerate(shape)
        if wider[path][axis] != size
    ]
    return (UnitGroup(name="hidden", kind="hidden", count=config.hidden_size, slices=tuple(slices)),)


def _sublayers(config: BertConfig, kind: str, inputs: list[str], output: str) -> tuple[UnitGroup, ...]:
    slices = []
    for layer, (path, _, _) in enumerate(_layers(config)):
        for name in inputs:
            slices.append(UnitSlices(path=f"{path}/{name}/kernel", axis=1, unit=layer))
            slices.append(UnitSlices(path=f"{path}/{name}/bias", axis=0, unit=layer))
        slices.append(UnitSlices(path=f"{path}/{output}/kernel", axis=0, unit=layer, gated=True))
        slices.append(UnitSlices(path=f"{path}/{output}/bias", axis=None, unit=layer, gated=True))
    name = f"{prefixed(config.variant.layers, config).removesuffix('/layer')}/{kind}"
    return (UnitGroup(name=name, kind=kind, count=config.num_hidden_layers, slices=tuple(slices)),)


def _layers(config: BertConfig) -> list[tuple[str, int, int]]:
    """`(path, heads, width)` of every layer."""
    sizes = zip(config.num_attention_heads, config.intermediate_size, strict=True)
    return [(f"{prefixed(config.variant.layers, config)}/{layer}", *size) for layer, size in enumerate(sizes)]
