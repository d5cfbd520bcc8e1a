"""Counting weights and bytes."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxcompress._src.arrays.protocol import describe_leaf
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.report.count import count_nonzeros, holds_numbers, stored_bytes, tied_to
from jaxcompress._src.report.disk import disk_bytes
from jaxcompress._src.report.groups import GroupBy, group_names
from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafSize:
    """One leaf.

    Attributes:
        path: such as `encoder/0/kernel`.
        kind: in words; see `describe_leaf`.
        group: the group it is counted in.
        shape: logical.
        weights: number of logical entries.
        nonzeros: how many of them are not zero; None for an abstract leaf.
        dense_bytes: of the same weights in the baseline dtype.
        stored_bytes: of what is stored in memory: codes, scales, indices, padding.
        tied_to: path of the first leaf that is the same array, or None. A tied leaf is in no total.
    """

    path: str
    kind: str
    group: str
    shape: tuple[int, ...]
    weights: int
    nonzeros: int | None
    dense_bytes: int
    stored_bytes: int
    tied_to: str | None = None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per logical entry; NaN without entries."""
        return _ratio(8 * self.stored_bytes, self.weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeTotal:
    """The sum over a group of leaves, or over all; a tied leaf is counted once.

    Attributes:
        name: of the group, or `total`.
        leaves: how many are counted.
        weights: number of logical entries.
        nonzeros: how many of them are not zero; None if any leaf is abstract.
        dense_bytes: in the baseline dtype.
        stored_bytes: in memory.
    """

    name: str
    leaves: int
    weights: int
    nonzeros: int | None
    dense_bytes: int
    stored_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per logical entry; NaN without entries."""
        return _ratio(8 * self.stored_bytes, self.weights)

    @property
    def sparsity(self) -> float | None:
        """Share of zeros; None if unknown, NaN without entries."""
        return None if self.nonzeros is None else _ratio(self.weights - self.nonzeros, self.weights)

    @property
    def compression(self) -> float:
        """Dense bytes per stored byte; NaN if nothing is stored."""
        return _ratio(self.dense_bytes, self.stored_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeReport:
    """Sizes of a tree.

    Attributes:
        leaves: one entry for each, in the order of the tree.
        groups: totals by group.
        total: over all leaves.
        baseline: dtype of the dense bytes.
        disk_bytes: size of the files, if a path was given.
    """

    leaves: tuple[LeafSize, ...]
    groups: tuple[SizeTotal, ...]
    total: SizeTotal
    baseline: str
    disk_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values; ratios that are not numbers are None."""
        return {
            "baseline": self.baseline,
            "disk_bytes": self.disk_bytes,
            "total": _to_dict(self.total, "bits_per_weight", "sparsity", "compression"),
            "groups": [_to_dict(group, "bits_per_weight", "sparsity", "compression") for group in self.groups],
            "leaves": [_to_dict(leaf, "bits_per_weight") for leaf in self.leaves],
        }


@on_auto_axes
def size_report(
    params: Params,
    *,
    group_by: GroupBy | None = None,
    disk_path: str | os.PathLike[str] | None = None,
    baseline: Any = "float32",
) -> SizeReport:
    """Counts weights, nonzeros and bytes, leaf by leaf.

    Leaves that hold no numbers (random keys, Python scalars) are left out. The same array at two paths (tied weights)
    is counted once, at the first.

    Args:
        params: concrete or abstract (`jax.eval_shape`); compressed arrays are leaves.
        group_by: how to sum: a mapping from names to selectors, which must not overlap (the rest is `other`), or a
            function `(path, leaf) -> name`. By default, the first key of the path.
        disk_path: a file or directory whose size belongs into the report.
        baseline: dtype of the dense model that sizes are compared with.

    Returns:
        The report.

    Raises:
        ValueError: groups overlap, or a selector matches nothing.
        FileNotFoundError: there is nothing at `disk_path`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress.arrays import QuantizedArray
        >>> codes, scale = jnp.ones((64, 8), "int8"), jnp.ones((1, 8), "float32")
        >>> kernel = QuantizedArray(data=codes, scale=scale, dtype=jnp.dtype("float32"))
        >>> report = size_report({"dense": {"kernel": kernel}, "embed": {"embedding": jnp.zeros((10, 64))}})
        >>> [(group.name, group.dense_bytes, group.stored_bytes) for group in report.groups]
        [('dense', 2048, 544), ('embed', 2560, 2560)]
        >>> report.leaves[0].kind, report.leaves[0].bits_per_weight
        ('int8 per-channel', 8.5)
    """
    dtype = jnp.dtype(baseline)
    named = zip(leaves_with_paths(params), group_names(params, group_by), strict=True)
    numbers = [(path, leaf, group) for (path, leaf), group in named if holds_numbers(leaf)]
    ties = tied_to([leaf for _, leaf, _ in numbers])
    leaves = tuple(
        _measure(path, leaf, group, None if tie is None else numbers[tie][0], dtype.itemsize)
        for (path, leaf, group), tie in zip(numbers, ties, strict=True)
    )
    names = _ordered([leaf.group for leaf in leaves], group_by)
    return SizeReport(
        leaves=leaves,
        groups=tuple(_sum(name, [leaf for leaf in leaves if leaf.group == name]) for name in names),
        total=_sum("total", leaves),
        baseline=dtype.name,
        disk_bytes=None if disk_path is None else disk_bytes(disk_path),
    )


def _measure(path: str, leaf: Any, group: str, tie: str | None, itemsize: int) -> LeafSize:
    try:
        weights = math.prod(leaf.shape)
        return LeafSize(
            path=path,
            kind=describe_leaf(leaf),
            group=group,
            shape=tuple(leaf.shape),
            weights=weights,
            nonzeros=count_nonzeros(leaf),
            dense_bytes=weights * itemsize,
            stored_bytes=stored_bytes(leaf),
            tied_to=tie,
        )
    except Exception as err:
        err.add_note(f"at leaf {path!r}")
        raise


def _sum(name: str, leaves: Sequence[LeafSize]) -> SizeTotal:
    counted = [leaf for leaf in leaves if leaf.tied_to is None]
    nonzeros = [leaf.nonzeros for leaf in counted if leaf.nonzeros is not None]
    return SizeTotal(
        name=name,
        leaves=len(counted),
        weights=sum(leaf.weights for leaf in counted),
        nonzeros=sum(nonzeros) if len(nonzeros) == len(counted) else None,
        dense_bytes=sum(leaf.dense_bytes for leaf in counted),
        stored_bytes=sum(leaf.stored_bytes for leaf in counted),
    )


def _ordered(names: Sequence[str], group_by: GroupBy | None) -> list[str]:
    """Names of groups once each: as given, those of a function and the rest in the order of the tree."""
    present = dict.fromkeys(names)
    given = [name for name in group_by if name in present] if isinstance(group_by, Mapping) else []
    return list(dict.fromkeys([*given, *present]))


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _to_dict(size: LeafSize | SizeTotal, *ratios: str) -> dict[str, Any]:
    values = {name: getattr(size, name) for name in ratios}
    finite = {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}
    fields = dataclasses.asdict(size) | finite
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
