"""From the sharding of a logical leaf to those of its parts."""

import dataclasses
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from jaxcompress._src.arrays.additive import AdditiveCodebookArray
from jaxcompress._src.arrays.bitmask import BitmaskSparseArray
from jaxcompress._src.arrays.codebook import CodebookArray
from jaxcompress._src.arrays.input_quantized import InputQuantizedArray
from jaxcompress._src.arrays.low_rank import LowRankArray
from jaxcompress._src.arrays.n_of_m import NMSparseArray
from jaxcompress._src.arrays.packed import PackedArray, codes_per_block
from jaxcompress._src.arrays.quantized import QuantizedArray


def component_shardings(leaf: Any, sharding: NamedSharding) -> Any:
    """Shardings of the stored parts of `leaf` that correspond to `sharding` of the array it stands for.

    Axes of size 1 (scales of a whole axis) are replicated. On every other axis the share of a device must hold whole
    blocks: whole bytes of packed codes, whole groups, whole N:M runs. A bit-mask array can be cut along its rows, into
    as many shards as it was built for, and along its stacked axes. The factors of a `LowRankArray` are cut along the
    axes that they have, and hold their whole rank. The runs of an `AdditiveCodebookArray` stay whole. Packed zero
    points are replicated along an axis where shares would not be whole bytes, and scales along one with partial blocks.

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
    if isinstance(leaf, QuantizedArray):
        data = component_shardings(leaf.data, sharding)
        if leaf.partial is not None:
            # Shares of an axis with partial blocks do not begin where a block does.
            entries = _entries(sharding, leaf.ndim)
            entries[leaf.partial[0]] = None
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*entries))
        return dataclasses.replace(
            leaf,
            data=data,
            scale=component_shardings(leaf.scale, sharding),
            zero_point=None if leaf.zero_point is None else _cut_zero_points(leaf.zero_point, sharding),
        )
    if isinstance(leaf, CodebookArray):
        data, table = component_shardings(leaf.data, sharding), component_shardings(leaf.table, sharding)
        return dataclasses.replace(leaf, data=data, table=table)
    if isinstance(leaf, AdditiveCodebookArray):
        return _cut_runs(leaf, sharding)
    if isinstance(leaf, PackedArray):
        return dataclasses.replace(leaf, data=_cut_whole_blocks(leaf, leaf.axis, codes_per_block(leaf.bits), sharding))
    if isinstance(leaf, NMSparseArray):
        _cut_whole_blocks(leaf, leaf.axis, leaf.pattern[1], sharding)
        parts = [component_shardings(part, sharding) for part in (leaf.values, leaf.index)]
        return dataclasses.replace(leaf, values=parts[0], index=parts[1])
    if isinstance(leaf, BitmaskSparseArray):
        return _cut_rows(leaf, sharding)
    if isinstance(leaf, LowRankArray):
        return dataclasses.replace(
            leaf,
            left=_cut_factor(leaf.left, sharding),
            right=_cut_factor(leaf.right, sharding),
            residual=None if leaf.residual is None else component_shardings(leaf.residual, sharding),
        )
    if isinstance(leaf, InputQuantizedArray):
        parts = (leaf.scale, leaf.zero_point)
        scale, zero_point = (None if part is None else _of_leading_axes(part, sharding) for part in parts)
        weight = component_shardings(leaf.weight, sharding)
        return dataclasses.replace(leaf, weight=weight, scale=scale, zero_point=zero_point)
    return _replicate_ones(leaf, sharding)


def _cut_factor(factor: Any, sharding: NamedSharding) -> Any:
    *sizes, _ = factor.shape
    kept = [None if size == 1 else entry for size, entry in zip(sizes, _entries(sharding, len(sizes)), strict=True)]
    return component_shardings(factor, NamedSharding(sharding.mesh, PartitionSpec(*kept, None)))


def _cut_zero_points(part: Any, sharding: NamedSharding) -> Any:
    """Packed ones are small: on an axis where shares would not be whole bytes, every device holds them all."""
    if not isinstance(part, PackedArray):
        return _replicate_ones(part, sharding)
    (*entries,) = _entries(sharding, part.ndim)
    if part.width % (_ways(sharding, entries[part.axis]) * codes_per_block(part.bits)):
        entries[part.axis] = None
    cut = _replicate_ones(part, NamedSharding(sharding.mesh, PartitionSpec(*entries)))
    return dataclasses.replace(part, data=cut)


def _cut_runs(leaf: AdditiveCodebookArray, sharding: NamedSharding) -> AdditiveCodebookArray:
    _cut_whole_blocks(leaf, leaf.axis, leaf.length, sharding)
    entries = _entries(sharding, leaf.ndim)
    codes, tables = (NamedSharding(sharding.mesh, PartitionSpec(*entries, *[None] * more)) for more in (1, 3))
    scale = None if leaf.scale is None else _replicate_ones(leaf.scale, sharding)
    data, table = component_shardings(leaf.data, codes), _replicate_ones(leaf.table, tables)
    return dataclasses.replace(leaf, data=data, table=table, scale=scale)


def _of_leading_axes(part: Any, sharding: NamedSharding) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[: part.ndim]))


def _cut_whole_blocks(leaf: Any, axis: int, block: int, sharding: NamedSharding) -> NamedSharding:
    entries = _entries(sharding, leaf.ndim)
    ways = _ways(sharding, entries[axis])
    if leaf.shape[axis] % (ways * block) and ways > 1:
        raise ValueError(
            f"Axis {axis} of a {type(leaf).__name__} of shape {leaf.shape} holds blocks of {block}; "
            f"{ways} devices cannot hold whole blocks."
        )
    return NamedSharding(sharding.mesh, PartitionSpec(*entries))


def _replicate_ones(part: Any, sharding: NamedSharding) -> NamedSharding:
    entries = _entries(sharding, len(part.shape))
    kept = [None if size == 1 else entry for size, entry in zip(part.shape, entries, strict=True)]
    for axis, (size, entry) in enumerate(zip(part.shape, kept, strict=True)):
        if size % _ways(sharding, entry):
            raise ValueError(
                f"Axis {axis} of a part of shape {tuple(part.shape)} cannot be cut into {_ways(sharding, entry)} "
                "whole shares; choose smaller groups or replicate that axis."
            )
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))


def _cut_rows(leaf: BitmaskSparseArray, sharding: NamedSharding) -> BitmaskSparseArray:
    entries = _entries(sharding, leaf.ndim)
    stack_ndim = leaf.starts.ndim - 1
    stack, rows, columns = entries[:stack_ndim], entries[stack_ndim], entries[stack_ndim + 1 :]
    shards = leaf.values.shape[-2]
    if any(columns) or _ways(sharding, rows) not in (1, shards):
        raise ValueError(
            f"A BitmaskSparseArray of shape {leaf.shape} built for {shards} shards can be cut into {shards} along its "
            f"rows (axis {stack_ndim}) only, got {sharding.spec}; rebuild it with `shards=`."
        )

    def part(*spec: Any) -> NamedSharding:
        return NamedSharding(sharding.mesh, PartitionSpec(*stack, *spec))

    values = part(rows, None)
    if isinstance(leaf.values, PackedArray):
        values = dataclasses.replace(leaf.values, data=values)
    index = dataclasses.replace(leaf.index, data=part(rows, None))
    return dataclasses.replace(leaf, values=values, index=index, starts=part(rows))


def _entries(sharding: NamedSharding, ndim: int) -> list[Any]:
    spec = list(sharding.spec)
    if len(spec) > ndim:
        raise ValueError(f"The sharding {sharding.spec} has more axes than an array of {ndim} axes.")
    return spec + [None] * (ndim - len(spec))


def _ways(sharding: NamedSharding, entry: Any) -> int:
    names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
    ways = 1
    for name in names:
        ways *= sharding.mesh.shape[name]
    return ways
