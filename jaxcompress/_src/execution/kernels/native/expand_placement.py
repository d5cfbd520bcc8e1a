"""Devices of stored weights that are written out or multiplied: every device works on what it has."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxcompress._src.execution.kernels.native.placement import _entry, _names, _without


def partitioned_expansion(expansion: Callable[..., Array], storage: Any) -> Callable[..., Array]:
    """An expansion of stored weights that every device computes of the entries, rows and columns that it has.

    Args:
        expansion: takes the operands of `expand_sparse` that there are; returns weights by entries, rows and columns.
        storage: the `SparseFormat`.

    Returns:
        The expansion with this rule.
    """

    def partition(mesh: Any, arguments: Sequence[Any], result: Any) -> Any:
        del result
        entries = _entry(arguments[1], 0)
        rows, columns = _cut(mesh, arguments, storage, taken=entries)
        whole = NamedSharding(mesh, PartitionSpec(entries, rows, columns))
        return mesh, expansion, whole, _shardings(mesh, arguments, storage, (entries, rows, columns))

    def rule(mesh: Any, operands: Sequence[Any], results: Any) -> str:
        del mesh, results
        return f"{', '.join(_axes(operands, storage))} -> e r c"

    def infer(mesh: Any, arguments: Sequence[Any], result: Any) -> NamedSharding:
        return partition(mesh, arguments, result)[2]

    partitioned = custom_partitioning(expansion)
    partitioned.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)
    return partitioned


def partitioned_sparse_product(product: Callable[..., Array], storage: Any, sums_columns: bool) -> Callable[..., Array]:
    """A product with stored weights that every device computes of what it has; products of shares are added up.

    Args:
        product: takes x, [M, K], and the operands of `sparse_matmul` that there are; returns [M, N].
        storage: the `SparseFormat`.
        sums_columns: whether K are the columns of the weights.

    Returns:
        The product with this rule.
    """

    def partition(mesh: Any, arguments: Sequence[Any], result: Any) -> Any:
        _, *parts = arguments
        of_x = _entry(result, 0)
        rows, columns = _cut(mesh, parts, storage, taken=of_x)
        inputs, outputs = (columns, rows) if sums_columns else (rows, columns)

        def local(*operands: Array) -> Array:
            y = product(*operands)
            return y if inputs is None else jax.lax.psum(y, _names(inputs))

        def sharding(*spec: Any) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*spec))

        shardings = (sharding(of_x, inputs), *_shardings(mesh, parts, storage, (None, rows, columns)))
        return mesh, local, sharding(of_x, outputs), shardings

    def rule(mesh: Any, operands: Sequence[Any], results: Any) -> str:
        del mesh, results
        outputs = "r" if sums_columns else "c"
        return f"m k, {', '.join(_axes(operands[1:], storage))} -> m {outputs}"

    def infer(mesh: Any, arguments: Sequence[Any], result: Any) -> NamedSharding:
        rows, columns = _cut(mesh, arguments[1:], storage, taken=_entry(arguments[0], 0))
        del result
        return NamedSharding(mesh, PartitionSpec(_entry(arguments[0], 0), rows if sums_columns else columns))

    partitioned = custom_partitioning(product)
    partitioned.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)
    return partitioned


def _axes(operands: Sequence[Any], storage: Any) -> list[str]:
    """Of values, bits and the rest, as a rule names them."""
    stored = {
        "mask": ["e s v", "e r b"],
        "along rows": ["e r v", "e r b"],
        "across rows": ["e v c", "e b c"],
    }[storage.layout]
    rest = operands[2:]
    names = ["", "", "e r", "e h{0} w{0}"]
    names = [names[len(part.shape)].format(number) for number, part in enumerate(rest)]
    return [*stored, *names]


def _parameters(parts: Sequence[Any]) -> list[Any]:
    return [part for part in parts[2:] if part.ndim == 3]


def _cut(mesh: Any, parts: Sequence[Any], storage: Any, *, taken: Any) -> tuple[Any, Any]:
    """Names of the mesh along which rows and columns are cut: as bits are, where shares are whole runs and blocks."""
    values, bits, *_ = parts
    rows = _without(_entry(bits, 1), taken)
    columns = _without(_without(_entry(bits, 2), taken), rows) if storage.layout == "across rows" else None
    ways, column_ways = (math.prod(mesh.shape[name] for name in _names(names)) for names in (rows, columns))
    blocks = [[part.shape[axis] for part in _parameters(parts) if part.shape[axis] > 1] for axis in (1, 2)]
    sizes = [*blocks[0], values.shape[1]] if storage.layout == "mask" else blocks[0]
    if storage.rows % ways or any(size % ways or storage.rows % size for size in sizes):
        rows = None
    if storage.layout == "across rows" and rows is not None:
        # Whole runs, whose values and places fill whole bytes.
        slots = storage.slots(storage.rows // ways)
        per_byte = max(2 if storage.packed else 1, 8 // storage.place_bits)
        if storage.rows % (ways * storage.pattern[1]) or slots % per_byte:
            rows = None
    if storage.columns % column_ways or any(size % column_ways or storage.columns % size for size in blocks[1]):
        columns = None
    return rows, columns


def _shardings(mesh: Any, parts: Sequence[Any], storage: Any, names: tuple[Any, Any, Any]) -> tuple[NamedSharding, ...]:
    entries, rows, columns = names

    def sharding(part: Any, *, is_parameter: bool) -> NamedSharding:
        spec = [entries, rows, columns]
        if is_parameter:
            spec = [name if axis == 0 or part.shape[axis] > 1 else None for axis, name in enumerate(spec)]
        return NamedSharding(mesh, PartitionSpec(*spec[: part.ndim]))

    return tuple(sharding(part, is_parameter=number > 1 and part.ndim == 3) for number, part in enumerate(parts))
