"""The units of a GPT-2: what can be removed as a whole."""

from jaxcompress._src.models.gpt2.config import GPT2Config
from jaxcompress._src.models.gpt2.parameters import parameter_shapes
from jaxcompress._src.units.group import UnitGroup, UnitSlices


def gpt2_head_units(config: GPT2Config) -> tuple[UnitGroup, ...]:
    """The attention heads of every layer that has some, one group `<layer>/heads` for each, of kind `heads`.

    Query, key and value are one kernel: a head owns three runs of it and of its bias, and its rows of the output
    kernel, which a gate multiplies.

    Example:
        >>> config = GPT2Config(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
        >>> group = gpt2_head_units(config)[0]
        >>> group.name, group.count, [(part.offset, part.width) for part in group.slices[:3]]
        ('transformer/h/0/heads', 4, [(0, 8), (32, 8), (64, 8)])
    """
    groups = []
    for path, heads, _ in _layers(config):
        size = config.head_size
        slices = [
            UnitSlices(path=f"{path}/attn/c_attn/{leaf}", axis=axis, offset=part * heads * size, width=size)
            for leaf, axis in (("kernel", 1), ("bias", 0))
            for part in range(3)
        ]
        slices.append(UnitSlices(path=f"{path}/attn/c_proj/kernel", axis=0, width=size, gated=True))
        if heads:
            groups.append(UnitGroup(name=f"{path}/heads", kind="heads", count=heads, slices=tuple(slices)))
    return tuple(groups)


def gpt2_column_units(config: GPT2Config) -> tuple[UnitGroup, ...]:
    """The columns of the feed-forward network of every layer that has some: `<layer>/columns`, of kind `columns`.

    A column is one output of the first kernel, its bias, and the row of the second that reads it, which a gate
    multiplies.
    """
    groups = []
    for path, _, width in _layers(config):
        slices = (
            UnitSlices(path=f"{path}/mlp/c_fc/kernel", axis=1),
            UnitSlices(path=f"{path}/mlp/c_fc/bias", axis=0),
            UnitSlices(path=f"{path}/mlp/c_proj/kernel", axis=0, gated=True),
        )
        if width:
            groups.append(UnitGroup(name=f"{path}/columns", kind="columns", count=width, slices=slices))
    return tuple(groups)


def gpt2_attention_units(config: GPT2Config) -> tuple[UnitGroup, ...]:
    """The attention sublayers: one group with one unit for each layer, of kind `attentions`.

    A unit owns all of its sublayer but the norm. Removing it leaves 0 heads and an output bias of zeros: the residual
    stream passes by, exactly as in the masked model. A whole layer is its two sublayers.
    """
    return _sublayers(config, "attentions", "attn/c_attn", "attn/c_proj")


def gpt2_ffn_units(config: GPT2Config) -> tuple[UnitGroup, ...]:
    """The feed-forward sublayers: one group with one unit for each layer, of kind `ffns`; as the attentions are."""
    return _sublayers(config, "ffns", "mlp/c_fc", "mlp/c_proj")


def gpt2_hidden_units(config: GPT2Config) -> tuple[UnitGroup, ...]:
    """The width of the residual stream, the same in every layer: one group of `hidden_size` units, of kind `hidden`.

    A unit owns one feature of the embeddings, of every norm, of what reads the stream and of what writes to it; gates
    multiply what writes. The masked model is not exactly the shrunk one: the statistics of the norms are taken over
    all features when some are zero, and over fewer once they are gone.
    """
    slices = [
        UnitSlices(path=path, axis=axis, gated=gated)
        for path in parameter_shapes(config)
        for axis, gated in _hidden_axes(path)
    ]
    return (UnitGroup(name="hidden", kind="hidden", count=config.hidden_size, slices=tuple(slices)),)


def _hidden_axes(path: str) -> tuple[tuple[int, bool], ...]:
    """`(axis, gated)` for each axis of a leaf that runs along the residual stream."""
    if path.endswith(("wte/embedding", "wpe/embedding", "c_proj/kernel")):
        return ((1, True),)
    if "/ln_" in path or path.startswith("ln_") or path.endswith("c_proj/bias"):
        return ((0, True),)
    return ((0, False),) if path.endswith("/kernel") else ()


def _sublayers(config: GPT2Config, kind: str, first: str, output: str) -> tuple[UnitGroup, ...]:
    slices = []
    for layer, (path, _, _) in enumerate(_layers(config)):
        slices += [
            UnitSlices(path=f"{path}/{first}/kernel", axis=1, unit=layer),
            UnitSlices(path=f"{path}/{first}/bias", axis=0, unit=layer),
            UnitSlices(path=f"{path}/{output}/kernel", axis=0, unit=layer, gated=True),
            UnitSlices(path=f"{path}/{output}/bias", axis=None, unit=layer, gated=True),
        ]
    prefix = "" if config.head == "decoder" else "transformer/"
    return (UnitGroup(name=f"{prefix}{kind}", kind=kind, count=config.num_hidden_layers, slices=tuple(slices)),)


def _layers(config: GPT2Config) -> list[tuple[str, int, int]]:
    """`(path, heads, width)` of every layer."""
    prefix = "" if config.head == "decoder" else "transformer/"
    sizes = zip(config.num_attention_heads, config.intermediate_size, strict=True)
    return [(f"{prefix}h/{layer}", *size) for layer, size in enumerate(sizes)]
