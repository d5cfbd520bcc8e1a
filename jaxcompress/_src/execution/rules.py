"""What compressed arrays do in the primitives that touch weights. A rule returns None where it does not apply."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.arrays.protocol import call, cast, reshape, slice_axis, transpose
from jaxcompress._src.arrays.sharding import component_shardings
from jaxcompress._src.meshes import varying
from jaxcompress._src.trace.contraction import is_by_expert
from jaxcompress._src.types import is_compressed

Rule = Callable[[Any, list[Any]], Sequence[Any] | None]
"""`(equation, values) -> outputs`, plain or compressed; at least one of the values is compressed."""


def _one(result: Any) -> Sequence[Any] | None:
    return None if result is None else [result]


def _conv(eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    inputs, kernel = values
    return None if is_compressed(inputs) else _one(call(kernel, "convolve", inputs, eqn.params))


def _ragged_dot(eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    inputs, kernel, *sizes = values
    if not is_compressed(kernel) or is_compressed(inputs) or not is_by_expert(eqn):
        return None
    return _one(call(kernel, "ragged_dot", jnp.asarray(inputs), *map(jnp.asarray, sizes), eqn.params))


def _transpose(eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    return _one(transpose(values[0], eqn.params["permutation"]))


def _reshape(eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    return None if eqn.params["dimensions"] is not None else _one(reshape(values[0], eqn.outvars[0].aval.shape))


def _squeeze(eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    return _one(reshape(values[0], eqn.outvars[0].aval.shape))


def _broadcast(eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    """New axes of size 1 only: a real broadcast would store the codes many times."""
    sizes = [eqn.params["shape"][axis] for axis in eqn.params["broadcast_dimensions"]]
    same_size = eqn.outvars[0].aval.size == eqn.invars[0].aval.size
    return _one(reshape(values[0], eqn.params["shape"])) if same_size and tuple(sizes) == values[0].shape else None


def _convert(eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    return _one(cast(values[0], eqn.params["new_dtype"]))


def _slice(eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    if eqn.params["strides"] is not None and any(stride != 1 for stride in eqn.params["strides"]):
        return None
    leaf, limits = values[0], eqn.params["limit_indices"]
    for axis, (start, limit) in enumerate(zip(eqn.params["start_indices"], limits, strict=True)):
        if leaf is not None and limit - start != leaf.shape[axis]:
            leaf = slice_axis(leaf, axis, start, limit - start)
    return _one(leaf)


def _dynamic_slice(eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    if not is_compressed(values[0]) or len(values) != 1 + len(values[0].shape):
        return None
    leaf, starts = values[0], values[1:]
    for axis, (start, size) in enumerate(zip(starts, eqn.params["slice_sizes"], strict=True)):
        if leaf is not None and size != leaf.shape[axis]:
            # The primitive clamps; block arithmetic on the parts must start from the clamped index.
            leaf = slice_axis(leaf, axis, jnp.clip(start, 0, leaf.shape[axis] - size), size)
    return _one(leaf)


def _gather(eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    """Rows along the first axis: `table[ids]`, `jnp.take(table, ids, axis=0)`."""
    table, indices = values
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    batch_ndim = indices.ndim - 1
    offsets = tuple(range(batch_ndim, batch_ndim + len(sizes) - 1))
    by_row = (
        is_compressed(table)
        and tuple(numbers.collapsed_slice_dims) == tuple(numbers.start_index_map) == (0,)
        and tuple(sizes) == (1, *table.shape[1:])
        and tuple(numbers.offset_dims) == offsets
    )
    if not by_row:
        return None
    rows = indices[..., 0]
    inside = jnp.clip(rows, 0, table.shape[0] - 1)
    picked = call(table, "take_rows", inside)
    if picked is None:
        return None
    if eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
        fill = jnp.nan if eqn.params["fill_value"] is None else eqn.params["fill_value"]
        valid = jnp.expand_dims(rows == inside, tuple(range(batch_ndim, picked.ndim)))
        picked = jnp.where(valid, picked, jnp.asarray(fill, picked.dtype))
    return [picked]


def _sharding_constraint(eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    sharding = eqn.params["sharding"]
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return None
    return [jax.lax.with_sharding_constraint(values[0], component_shardings(values[0], sharding))]


def _reshard(eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    """Nothing to compute: the parts stay as they are, and results are given their sharding."""
    del eqn
    return values


def _by_part(eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    """Primitives that are the identity."""
    return [jax.tree.map(lambda part: eqn.primitive.bind(part, **eqn.params), values[0])]


def _pvary(eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    """In `shard_map`: a part gets the axes along which it does not vary yet."""
    return [varying(values[0], eqn.params["axes"])]


RULES: dict[str, Rule] = {
    "conv_general_dilated": _conv,
    "ragged_dot_general": _ragged_dot,
    "gather": _gather,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _convert,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "sharding_constraint": _sharding_constraint,
    "reshard": _reshard,
    "copy": _by_part,
    "copy_p": _by_part,
    "stop_gradient": _by_part,
    "pvary": _pvary,
}
