"""From the sharding of a logical leaf to those of its parts."""

from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from jaxcompress._src.arrays.protocol import call
from jaxcompress._src.types import is_compressed


def component_shardings(leaf: Any, sharding: NamedSharding) -> Any:
    """Shardings of the stored parts of `leaf` that correspond to `sharding` of the array it stands for.

    Axes of size 1 (scales of a whole axis) are replicated. On every other axis the share of a device must hold whole
    blocks: whole bytes of packed codes, whole groups, whole N:M runs. A bit-mask array can be cut along its rows, into
    as many shards as it was built for, and along its stacked axes. The factors of a `LowRankArray` are cut along the
    axes that they have, and hold their whole rank. The runs of an `AdditiveCodebookArray` stay whole. Packed zero
    points are replicated along an axis where shares would not be whole bytes, and scales along one with partial blocks.
    Kinds that do not say how they are cut are replicated.

    Args:
        leaf: a plain or compressed array, or its abstract form.
        sharding: for the logical array.

    Returns:
        A tree of the structure of `leaf` with a `NamedSharding` for each part (a single one for a plain array), fit for
        `jax.device_put`.

    Raises:
        ValueError: a part cannot be cut as asked; names the axis and sizes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec
        >>> from jaxcompress._src.arrays.packed import pack
        >>> from jaxcompress.arrays import QuantizedArray, component_shardings
        >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))
        >>> codes = pack(jnp.ones((64, 8), "int8"), bits=4, axis=0)
        >>> leaf = QuantizedArray(data=codes, scale=jnp.ones((1, 8)), dtype=jnp.dtype("float32"))
        >>> component_shardings(leaf, NamedSharding(mesh, PartitionSpec("model", None))).scale.spec
        P(None, None)
    """
    return call(leaf, "shardings", sharding) if is_compressed(leaf) else ones_replicated(leaf, sharding)


def ones_replicated(part: Any, sharding: NamedSharding) -> NamedSharding:
    """The sharding of a plain part that has the logical axes, of full size or fewer: replicated where that is 1.

    Raises:
        ValueError: devices would not get equal shares.
    """
    entries = spec_entries(sharding, len(part.shape))
    entries = [None if size == 1 else entry for size, entry in zip(part.shape, entries, strict=True)]
    for axis, (size, entry) in enumerate(zip(part.shape, entries, strict=True)):
        if size % ways(sharding, entry):
            raise ValueError(
                f"Axis {axis} of a part of shape {tuple(part.shape)} cannot be cut into {ways(sharding, entry)} "
                "whole shares; choose smaller groups or replicate that axis."
            )
    return NamedSharding(sharding.mesh, PartitionSpec(*entries))


def entries_here(width: int, stored: int, *, block: int, stored_per_block: int) -> int:
    """How many of `width` entries an array holds: all, or those of the whole blocks of a share.

    Static sizes are those of the whole array. `jax.shard_map` hands out shares of what is stored, and puts them
    together again.

    Args:
        width: entries of the whole array.
        stored: what is stored along the axis.
        block: entries of a block.
        stored_per_block: what is stored of a block.

    Returns:
        The entries; `width` where they are no whole blocks of equal shares.

    Example:
        >>> entries_here(64, 32, block=2, stored_per_block=1), entries_here(64, 8, block=2, stored_per_block=1)
        (64, 16)
    """
    whole = -(-width // block) * stored_per_block
    is_share = 0 < stored < whole and whole % stored == width % block == stored % stored_per_block == 0
    return stored // stored_per_block * block if is_share else width


def whole_blocks(leaf: Any, axis: int, block: int, sharding: NamedSharding) -> NamedSharding:
    """The same sharding, with an entry for every axis.

    Args:
        leaf: whose logical axes are sharded.
        axis: holds the blocks.
        block: their size in logical entries.
        sharding: for the logical array.

    Raises:
        ValueError: the share of a device would not be whole blocks.
    """
    entries = spec_entries(sharding, leaf.ndim)
    count = ways(sharding, entries[axis])
    if leaf.shape[axis] % (count * block) and count > 1:
        raise ValueError(
            f"Axis {axis} of a {type(leaf).__name__} of shape {leaf.shape} holds blocks of {block}; "
            f"{count} devices cannot hold whole blocks."
        )
    return NamedSharding(sharding.mesh, PartitionSpec(*entries))


def spec_entries(sharding: NamedSharding, ndim: int) -> list[Any]:
    """The mesh axes of every array axis.

    Raises:
        ValueError: there are more than the array has.
    """
    spec = list(sharding.spec)
    if len(spec) > ndim:
        raise ValueError(f"The sharding {sharding.spec} has more axes than an array of {ndim} axes.")
    return spec + [None] * (ndim - len(spec))


def ways(sharding: NamedSharding, entry: Any) -> int:
    """How many shares an array axis is cut into."""
    names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
    count = 1
    for name in names:
        count *= sharding.mesh.shape[name]
    return count
