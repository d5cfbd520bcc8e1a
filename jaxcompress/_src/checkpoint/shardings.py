"""From the shardings that a caller asks for to one for every stored array."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxcompress._src.arrays.sharding import component_shardings
from jaxcompress._src.checkpoint.manifest import LeafRecord, StoredValue
from jaxcompress._src.tree.paths import path_string
from jaxcompress._src.types import is_compressed

ShardingChoice: TypeAlias = Sharding | Callable[[str, Any], Any] | Any
"""One sharding for all leaves, `(path, abstract leaf) -> sharding or None`, or a tree of shardings."""


def array_shardings(
    records: Sequence[LeafRecord], abstract: Sequence[Any], choice: ShardingChoice | None
) -> dict[str, Sharding | None]:
    """The sharding of every stored array, by name; None is the default device.

    Args:
        records: the stored leaves.
        abstract: the same leaves, with `jax.ShapeDtypeStruct` for arrays.
        choice: what the caller asks for: shardings of logical leaves.

    Raises:
        ValueError: a leaf that has no sharding or does not fit it, or a sharding that has no leaf; names it.
    """
    logical = _per_leaf(records, abstract, choice)
    by_name: dict[str, Sharding | None] = {}
    for record, leaf, sharding in zip(records, abstract, logical, strict=True):
        try:
            by_name |= _per_array(record.value, leaf, sharding)
        except ValueError as err:
            raise ValueError(f"Leaf {record.name!r} cannot be sharded as asked: {err}") from err
    return by_name


def _per_leaf(records: Sequence[LeafRecord], abstract: Sequence[Any], choice: Any) -> list[Any]:
    if choice is None or isinstance(choice, Sharding):
        return [choice] * len(records)
    if callable(choice):
        return [
            choice(record.name, leaf) if _has_arrays(record) else None
            for record, leaf in zip(records, abstract, strict=True)
        ]
    keyed = jax.tree_util.tree_flatten_with_path(choice, is_leaf=lambda node: node is None or is_compressed(node))[0]
    given = dict(keyed)
    used = [_longest_prefix(record, given) for record in records]
    unused = [path for path, sharding in keyed if sharding is not None and path not in used]
    if unused:
        raise ValueError(f"`sharding` has an entry at {path_string(unused[0])!r}, where no leaf is stored.")
    return [None if path is None else given[path] for path in used]


def _longest_prefix(record: LeafRecord, given: dict[tuple[Any, ...], Any]) -> tuple[Any, ...] | None:
    for length in range(len(record.path), -1, -1):
        if record.path[:length] in given:
            return record.path[:length]
    if _has_arrays(record):
        raise ValueError(f"`sharding` has no entry for leaf {record.name!r}; None stands for the default device.")
    return None


def _per_array(value: StoredValue, leaf: Any, sharding: Any) -> dict[str, Sharding | None]:
    names = [array.array or "" for array in value.arrays()]
    if not names or sharding is None or isinstance(sharding, SingleDeviceSharding):
        return dict.fromkeys(names, sharding)
    if is_compressed(sharding):
        return _by_name(value, sharding)
    if isinstance(sharding, NamedSharding):
        return _by_name(value, _named(value, leaf, sharding))
    if isinstance(sharding, Sharding) and not is_compressed(leaf):
        return dict.fromkeys(names, sharding)
    needed = "NamedSharding" if isinstance(sharding, Sharding) else "Sharding"
    raise ValueError(f"a {value.kind} needs a jax.sharding.{needed}, got {type(sharding).__name__}")


def _named(value: StoredValue, leaf: Any, sharding: NamedSharding) -> Any:
    try:
        parts = component_shardings(leaf, sharding)
    except AttributeError as err:
        raise ValueError("parts of it are not selected; give a compressed array of shardings for it") from err
    if value.kind == "prng_key":
        # Every key is a row of words, which stay together.
        return NamedSharding(parts.mesh, PartitionSpec(*parts.spec, None))
    if not is_compressed(leaf) and parts.is_equivalent_to(sharding, len(leaf.shape)):
        return sharding
    return parts


def _by_name(value: StoredValue, shardings: Any) -> dict[str, Sharding | None]:
    """Shardings by array name, from a tree of the structure of the leaf."""
    if value.array is not None:
        return {value.array: shardings}
    by_name: dict[str, Sharding | None] = {}
    for name, part in value.parts.items():
        by_name |= _by_name(part, shardings if value.kind == "prng_key" else getattr(shardings, name, None))
    return by_name


def _has_arrays(record: LeafRecord) -> bool:
    return next(record.value.arrays(), None) is not None
