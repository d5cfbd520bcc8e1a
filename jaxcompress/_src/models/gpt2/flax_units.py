"""The units of a GPT-2, by the names and the orientation of Hugging Face Flax."""

from jaxcompress._src.units.group import UnitGroup, UnitSlices


def gpt2_units(
    *, num_layers: int, num_heads: int, hidden_size: int, inner_size: int | None = None, prefix: str = "transformer/h"
) -> tuple[UnitGroup, ...]:
    """The heads and the feed-forward columns of every layer of a Hugging Face Flax GPT-2.

    Its kernels are stored (out, in), and query, key and value are one kernel `c_attn` of 3 x `hidden_size` outputs: a
    head owns three runs of it. Gates multiply the columns of `attn/c_proj` and `mlp/c_proj` that read the unit.

    Args:
        num_layers: number of layers.
        num_heads: of each layer.
        hidden_size: width of the residual stream, a multiple of `num_heads`.
        inner_size: feed-forward width; 4 x `hidden_size` by default.
        prefix: path under which layers are numbered.

    Returns:
        Two groups for each layer, of kind `heads` and `columns`.

    Raises:
        ValueError: `hidden_size` is not a multiple of `num_heads`.

    Example:
        >>> groups = gpt2_units(num_layers=2, num_heads=4, hidden_size=32)
        >>> [(group.name, group.count) for group in groups[:2]]
        [('transformer/h/0/heads', 4), ('transformer/h/0/columns', 128)]
        >>> [(part.path, part.offset, part.width) for part in groups[0].slices[:2]]
        [('transformer/h/0/attn/c_attn/kernel', 0, 8), ('transformer/h/0/attn/c_attn/kernel', 32, 8)]
    """
    if hidden_size % num_heads:
        raise ValueError(f"`hidden_size`, {hidden_size}, must be a multiple of `num_heads`, {num_heads}.")
    width = 4 * hidden_size if inner_size is None else inner_size
    return tuple(
        group
        for layer in range(num_layers)
        for group in (
            _heads(f"{prefix}/{layer}", num_heads, hidden_size),
            _columns(f"{prefix}/{layer}", width),
        )
    )


def _heads(path: str, heads: int, hidden: int) -> UnitGroup:
    width = hidden // heads
    fused = [
        UnitSlices(path=f"{path}/attn/c_attn/{leaf}", axis=0, offset=part * hidden, width=width)
        for leaf in ("kernel", "bias")
        for part in range(3)
    ]
    output = UnitSlices(path=f"{path}/attn/c_proj/kernel", axis=1, width=width, gated=True)
    return UnitGroup(name=f"{path}/heads", kind="heads", count=heads, slices=(*fused, output))


def _columns(path: str, width: int) -> UnitGroup:
    slices = (
        UnitSlices(path=f"{path}/mlp/c_fc/kernel", axis=0),
        UnitSlices(path=f"{path}/mlp/c_fc/bias", axis=0),
        UnitSlices(path=f"{path}/mlp/c_proj/kernel", axis=1, gated=True),
    )
    return UnitGroup(name=f"{path}/columns", kind="columns", count=width, slices=slices)
