"""The units of a Llama: what can be removed as a whole."""

from jaxcompress._src.models.llama.config import LlamaConfig
from jaxcompress._src.models.llama.parameters import parameter_shapes
from jaxcompress._src.units.group import UnitGroup, UnitSlices


def llama_head_units(config: LlamaConfig) -> tuple[UnitGroup, ...]:
    """The heads of keys and values of every layer that has some, each with all queries that it serves.

    A unit owns its columns of the key and value kernels, those of its queries, their biases, and the rows of the output
    kernel, which a gate multiplies. Groups are called `<layer>/heads`, of kind `heads`.

    Example:
        >>> config = LlamaConfig(
        ...     vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        ...     intermediate_size=64,
        ... )
        >>> group = llama_head_units(config)[0]
        >>> group.count, [part.width for part in group.slices]
        (2, [16, 8, 8, 16])
    """
    groups = []
    for path, heads, _ in _layers(config):
        wide = config.head_size * config.queries_per_key
        slices = []
        for name, width in (("q_proj", wide), ("k_proj", config.head_size), ("v_proj", config.head_size)):
            slices += _outputs(f"{path}/self_attn/{name}", config.qkv_bias, width=width)
        slices.append(UnitSlices(path=f"{path}/self_attn/o_proj/kernel", axis=0, width=wide, gated=True))
        if heads:
            groups.append(UnitGroup(name=f"{path}/heads", kind="heads", count=heads, slices=tuple(slices)))
    return tuple(groups)


def llama_column_units(config: LlamaConfig) -> tuple[UnitGroup, ...]:
    """The columns of the feed-forward network of every layer that has some: `<layer>/columns`, of kind `columns`.

    A unit is one output of the gate and up kernels, and the row of the down kernel that reads them, which a gate
    multiplies.
    """
    groups = []
    for path, _, width in _layers(config):
        slices = [part for name in ("gate_proj", "up_proj") for part in _outputs(f"{path}/mlp/{name}", config.mlp_bias)]
        slices.append(UnitSlices(path=f"{path}/mlp/down_proj/kernel", axis=0, gated=True))
        if width:
            groups.append(UnitGroup(name=f"{path}/columns", kind="columns", count=width, slices=tuple(slices)))
    return tuple(groups)


def llama_attention_units(config: LlamaConfig) -> tuple[UnitGroup, ...]:
    """The attention sublayers: one group with one unit for each layer, of kind `attentions`.

    A unit owns all of its sublayer but the norms. Removing it leaves 0 heads, and an output bias of zeros, if there is
    one: the residual stream passes by, exactly as in the masked model. A whole layer is its two sublayers.
    """
    return _sublayers(config, "attentions", "self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj", config.output_bias)


def llama_ffn_units(config: LlamaConfig) -> tuple[UnitGroup, ...]:
    """The feed-forward sublayers: one group with one unit for each layer, of kind `ffns`; as the attentions are."""
    return _sublayers(config, "ffns", "mlp", ("gate_proj", "up_proj"), "down_proj", config.mlp_bias)


def llama_hidden_units(config: LlamaConfig) -> tuple[UnitGroup, ...]:
    """The width of the residual stream, the same in every layer: one group of `hidden_size` units, of kind `hidden`.

    A unit owns one feature of the embedding, of every norm but those of queries and keys, of what reads the stream and
    of what writes to it; gates multiply what writes. The masked model is not exactly the shrunk one: the statistics of
    the norms are taken over all features when some are zero, and over fewer once they are gone.
    """
    slices = [
        UnitSlices(path=path, axis=axis, gated=gated)
        for path in parameter_shapes(config)
        for axis, gated in _hidden_axes(path)
    ]
    return (UnitGroup(name="hidden", kind="hidden", count=config.hidden_size, slices=tuple(slices)),)


def _hidden_axes(path: str) -> tuple[tuple[int, bool], ...]:
    """`(axis, gated)` for each axis of a leaf that runs along the residual stream."""
    if path.endswith("embed_tokens/embedding"):
        return ((1, True),)
    if path.endswith(("layernorm/weight", "/norm/weight")) or path == "norm/weight":
        return ((0, True),)
    if path.endswith(("o_proj/kernel", "down_proj/kernel")):
        return ((1, True),)
    if path.endswith(("o_proj/bias", "down_proj/bias")):
        return ((0, True),)
    return ((0, False),) if path.endswith("/kernel") else ()


def _sublayers(
    config: LlamaConfig, kind: str, sublayer: str, inputs: tuple[str, ...], output: str, output_bias: bool
) -> tuple[UnitGroup, ...]:
    bias = config.qkv_bias if sublayer == "self_attn" else config.mlp_bias
    slices = []
    for layer, (path, _, _) in enumerate(_layers(config)):
        for name in inputs:
            slices += _outputs(f"{path}/{sublayer}/{name}", bias, unit=layer)
        slices.append(UnitSlices(path=f"{path}/{sublayer}/{output}/kernel", axis=0, unit=layer, gated=True))
        if output_bias:
            slices.append(UnitSlices(path=f"{path}/{sublayer}/{output}/bias", axis=None, unit=layer, gated=True))
    prefix = "" if config.head == "decoder" else "model/"
    return (UnitGroup(name=f"{prefix}{kind}", kind=kind, count=config.num_hidden_layers, slices=tuple(slices)),)


def _outputs(path: str, bias: bool, *, width: int = 1, unit: int | None = None) -> list[UnitSlices]:
    slices = [UnitSlices(path=f"{path}/kernel", axis=1, width=width, unit=unit)]
    return [*slices, UnitSlices(path=f"{path}/bias", axis=0, width=width, unit=unit)] if bias else slices


def _layers(config: LlamaConfig) -> list[tuple[str, int, int]]:
    """`(path, heads of keys and values, width)` of every layer."""
    prefix = "" if config.head == "decoder" else "model/"
    sizes = zip(config.num_key_value_heads, config.intermediate_size, strict=True)
    return [(f"{prefix}layers/{layer}", *size) for layer, size in enumerate(sizes)]
