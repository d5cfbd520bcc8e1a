"""What belongs to a unit, as data: groups of units, and the slices of leaves that each of them owns."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitSlices:
    """The part of one leaf that belongs to the units of a group.

    Without `unit`, unit k owns the `width` indices from `offset + k * width` on, along `axis`, and the same again after
    every `count * width` indices, `repeat` times in all. With `unit`, that one unit owns the whole leaf: removing it
    leaves length 0 along `axis`, or, if `axis` is None, a leaf of zeros (the bias of an output that stays).

    Attributes:
        path: of the leaf, as `tree.path_string` writes it.
        axis: of the leaf, not negative; None only together with `unit`.
        offset: first index that belongs to unit 0.
        width: indices of each unit, in one run.
        repeat: runs of each unit: of a channel, after flattening (height, width, channel), that is height * width.
        unit: the only unit that owns this leaf; None: all do, in turn.
        gated: whether a gate multiplies these slices. Of a head or an FFN column, that is the rows of the kernel that
            reads it: one multiplication switches the unit off, whatever lies before.
    """

    path: str
    axis: int | None
    offset: int = 0
    width: int = 1
    repeat: int = 1
    unit: int | None = None
    gated: bool = False

    def __post_init__(self) -> None:
        """Checks the options."""
        if self.axis is None and self.unit is None:
            raise ValueError(f"Slices of {self.path!r}: `axis` may be None only where `unit` is given.")
        if self.axis is not None and self.axis < 0:
            raise ValueError(f"Slices of {self.path!r}: `axis` must not be negative, got {self.axis}.")
        if self.offset < 0 or self.width < 1 or self.repeat < 1:
            raise ValueError(
                f"Slices of {self.path!r}: `offset` must be at least 0, `width` at least 1 and `repeat` at least 1, "
                f"got {self.offset}, {self.width} and {self.repeat}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitGroup:
    """Units of one sort, such as the heads of a layer: each lives or dies as a whole.

    Attributes:
        name: unique among the groups in use, such as `encoder/layer/0/heads`.
        count: number of units.
        slices: what they own.
        kind: the sort, such as `heads`: groups of one kind may share a budget or a multiplier.

    Raises:
        ValueError: no units, no slices, or slices of a unit that does not exist.

    Example:
        >>> group = UnitGroup(
        ...     name="ffn", count=3, kind="columns",
        ...     slices=(UnitSlices(path="up", axis=1), UnitSlices(path="down", axis=0, gated=True)),
        ... )
        >>> group.count, [part.path for part in group.gated]
        (3, ['down'])
    """

    name: str
    count: int
    slices: tuple[UnitSlices, ...]
    kind: str = ""

    def __post_init__(self) -> None:
        """Checks the options."""
        if self.count < 1:
            raise ValueError(f"Unit group {self.name!r}: `count` must be at least 1, got {self.count}.")
        if not self.slices:
            raise ValueError(f"Unit group {self.name!r} owns no slices.")
        for part in self.slices:
            if part.unit is not None and not 0 <= part.unit < self.count:
                raise ValueError(
                    f"Unit group {self.name!r}: {part.path!r} belongs to unit {part.unit}, but there are {self.count}."
                )

    @property
    def gated(self) -> tuple[UnitSlices, ...]:
        """The slices that a gate multiplies."""
        return tuple(part for part in self.slices if part.gated)


def index_owners(part: UnitSlices, count: int, length: int) -> np.ndarray:
    """The unit that owns each index of the slices' axis, -1 where none does.

    Everything that spreads over units, or sums, counts or takes them, goes by this.

    Args:
        part: slices with an axis.
        count: units of their group.
        length: of the axis.

    Returns:
        int (length,).

    Example:
        >>> index_owners(UnitSlices(path="w", axis=0, offset=1, width=2, repeat=2), 2, 10).tolist()
        [-1, 0, 0, 1, 1, 0, 0, 1, 1, -1]
    """
    if part.unit is not None:
        return np.full(length, part.unit)
    owners = np.full(length, -1)
    runs = np.tile(np.repeat(np.arange(count), part.width), part.repeat)
    owners[part.offset : part.offset + len(runs)] = runs
    return owners


def leaf_shapes(params: Params) -> dict[str, tuple[int, ...]]:
    """The shape of every array, by path."""
    return {path: tuple(leaf.shape) for path, leaf in leaves_with_paths(params) if hasattr(leaf, "shape")}


def check_groups(groups: Sequence[UnitGroup], params: Params) -> None:
    """Checks that groups fit the parameters and one another.

    Raises:
        ValueError: two groups of one name; a leaf that does not exist; an axis or an index that its leaf lacks; or two
            groups whose units cut the same axis of a leaf so that one unit holds only a part of another. Names group
            and leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> group = UnitGroup(name="rows", count=4, slices=(UnitSlices(path="w", axis=0),))
        >>> check_groups([group], {"w": jnp.ones((3, 2))})
        Traceback (most recent call last):
        ValueError: Unit group 'rows' needs indices 0 to 3 on axis 0 of 'w', whose shape is (3, 2).
    """
    names = [group.name for group in groups]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Two unit groups have the name {repeated[0]!r}.")
    shapes = leaf_shapes(params)
    claims: dict[tuple[str, int], list[tuple[UnitGroup, UnitSlices]]] = {}
    for group in groups:
        for part in group.slices:
            _check_slices(group, part, shapes)
            if part.axis is not None and part.unit is None:
                claims.setdefault((part.path, part.axis), []).append((group, part))
    for (path, axis), owners in claims.items():
        for place, (group, part) in enumerate(owners):
            for other, other_part in owners[:place]:
                if _cut_each_other(
                    index_owners(part, group.count, shapes[path][axis]),
                    index_owners(other_part, other.count, shapes[path][axis]),
                ):
                    raise ValueError(
                        f"Unit groups {other.name!r} and {group.name!r} are in conflict on axis {axis} of {path!r}: "
                        "a unit of one holds only a part of a unit of the other."
                    )


def by_name(option: Any, name: str, groups: Sequence[UnitGroup], default: Any) -> Any:
    """The entry of an option that may be given by name (of a group, or path of a leaf), by kind, or once for all."""
    if not isinstance(option, Mapping):
        return option
    kinds = {group.name: group.kind for group in groups}
    return option.get(name, option.get(kinds.get(name, ""), default))


def check_known(names: Iterable[str], known: set[str], option: str) -> None:
    """Checks that what an option names exists.

    Raises:
        ValueError: it does not; lists what does.
    """
    if unknown := sorted(set(names) - known):
        raise ValueError(f"`{option}` names {unknown[0]!r}; there are {', '.join(sorted(known)) or 'none'}.")


def _check_slices(group: UnitGroup, part: UnitSlices, shapes: dict[str, tuple[int, ...]]) -> None:
    if part.path not in shapes:
        listed = "".join(f"\n  {path} {shape}" for path, shape in shapes.items())
        raise ValueError(f"Unit group {group.name!r} needs the leaf {part.path!r}. The leaves are:{listed or ' none'}")
    shape = shapes[part.path]
    if part.axis is not None and part.axis >= len(shape):
        raise ValueError(f"Unit group {group.name!r} needs axis {part.axis} of {part.path!r}, whose shape is {shape}.")
    end = part.offset + group.count * part.width * part.repeat
    if part.unit is None and part.axis is not None and end > shape[part.axis]:
        raise ValueError(
            f"Unit group {group.name!r} needs indices {part.offset} to {end - 1} on axis {part.axis} of {part.path!r}, "
            f"whose shape is {shape}."
        )


def _cut_each_other(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether some unit of one and some unit of the other overlap, and neither holds the other."""
    pairs, shared = np.unique(np.stack([first, second]), axis=1, return_counts=True)
    sizes = [np.bincount(owners[owners >= 0]) for owners in (first, second)]
    for (one, other), common in zip(pairs.T, shared, strict=True):
        if one >= 0 and other >= 0 and common < min(sizes[0][one], sizes[1][other]):
            return True
    return False
