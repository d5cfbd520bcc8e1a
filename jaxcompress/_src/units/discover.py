"""The units of any model, from its jaxpr."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxcompress._src.trace.coupled_axes import CoupledAxes, coupled_axes
from jaxcompress._src.trace.left_out import warn_left_out
from jaxcompress._src.trace.traced import traced
from jaxcompress._src.types import Params
from jaxcompress._src.units.group import UnitGroup, UnitSlices

KINDS = ("heads", "columns", "channels", "hidden")


def discover_units(
    apply: Callable[..., Any],
    params: Params,
    *inputs: Any,
    kinds: Sequence[str] = ("heads", "columns", "channels"),
) -> tuple[UnitGroup, ...]:
    """The units of a model that nobody described: what must stay or go together, read from its jaxpr.

    Every axis of every leaf is followed through the program, index by index. Two indices are coupled where an
    elementwise operation, a batch axis of a matmul or a loop brings them together: they stay or go together. A matmul
    or convolution that sums over an axis ends it: what reads it there is coupled with what wrote it, and what comes out
    is another axis. An axis that a reshape cuts into several, such as (heads, head size), is cut into units along the
    outermost one that may go, and the others lie inside these units; it is the same with axes that are merged or
    summed over at once. So a query head goes with the key and value head of its group, a channel with all that is
    added to it and with its rows behind a flattening, a gate's column with its partner in a fused kernel.

    An index must stay if it meets an axis of the inputs or outputs (classes, vocabulary, pixels, positions), a constant
    of the program (a rotary or sinusoidal table, an ALiBi slope), another index of its own axis (convolution windows,
    sorting), or a matmul of two activations that sums over it. What is left is a unit. Kinds are:

    - "heads": a matmul of two activations has one for each entry of a batch axis.
    - "channels": a convolution reads or writes them.
    - "columns": any others, such as the neurons of a feed-forward network.
    - "hidden": whatever else than a matmul with weights also sums over them, such as a norm: the width of a residual
      stream of a transformer. Masked and shrunk models differ for these alone, by the statistics of the norms.

    Gates multiply what reads the units, the rows of kernels that sum over them; of "hidden" units, what writes them.
    `shrink` takes the units out of the arrays. A model that holds sizes of its own, such as a Flax module, is then made
    anew with those of the arrays.

    Units of leaves that are stacked, as under `nn.scan`, are those of all layers at once, for the stack stays one
    array: unit k has the k-th index in every layer. A leaf on which no output depends belongs to no unit.

    Args:
        apply: `(params, *inputs) -> outputs`, pure and without dropout; all axes of its outputs stay, so leave out what
            is of no interest, such as hidden states.
        params: the tree; arrays, `jax.ShapeDtypeStruct` or compressed arrays. Statistics of a `BatchNorm` belong in it.
        *inputs: trees of arrays or `jax.ShapeDtypeStruct`; anything else (flags, None) is static. The units do not
            depend on batch size or length, but lengths should differ from 1.
        kinds: which units to return.

    Returns:
        Groups in the order in which the model runs. Those of a group lie side by side in every leaf, in one order. It
        is named as the leaf that first writes its units; where there are several of one leaf, `#` and a number follow.

    Raises:
        ValueError: an unknown kind; there are no units of these kinds: lists what every axis is.

    Warns:
        LeftOutWarning: axes stay because this function does not follow what the model does with them.

    Example:
        >>> import jax.numpy as jnp
        >>> def apply(params, x):
        ...     gate, up = jnp.split(x @ params["fused"], 2, axis=-1)
        ...     return x + (jnp.tanh(gate) * up) @ params["down"]
        >>> params = {"down": jnp.ones((3, 4)), "fused": jnp.ones((4, 6))}
        >>> (group,) = discover_units(apply, params, jnp.ones((5, 4)))
        >>> group.name, group.kind, group.count
        ('fused', 'columns', 3)
        >>> [(part.path, part.axis, part.offset, part.repeat, part.gated) for part in group.slices]
        [('down', 0, 0, 1, True), ('fused', 1, 0, 2, False)]

    References:
        Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", https://arxiv.org/abs/2301.12900, which follows
        the graph of PyTorch's modules.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"`kinds` has {unknown[0]!r}; there are {', '.join(map(repr, KINDS))}.")
    model = traced(apply, params, inputs)
    coupled = coupled_axes(model)
    paths = model.paths
    groups = _named([group for family in _families(coupled) for group in _groups(family, paths)])
    wanted = [group for group in groups if group.kind in kinds]
    if not wanted:
        lines = "".join(f"\n  {path!r}: {reason}" for path, reason in _reasons(coupled, paths, groups).items())
        raise ValueError(
            f"There are no units of the kinds {', '.join(map(repr, kinds))}. The leaves:{lines or ' none'}"
        )
    warn_left_out(
        _reasons(coupled, paths, groups, expected=False),
        "`discover_units` takes no units of",
        advice="Describe them by hand, as `UnitGroup`, if they matter.",
        stacklevel=2,
    )
    return tuple(wanted)


class _Owned(NamedTuple):
    """Who owns the indices of one axis of a leaf that may go.

    Attributes:
        units: the classes that do.
        counts: how many indices each of them owns.
        indices: these, unit by unit.
        read: when those of a unit are first read.
        written: when they are first written.
    """

    units: Int[np.ndarray, " units"]
    counts: Int[np.ndarray, " units"]
    indices: Int[np.ndarray, " n"]
    read: Int[np.ndarray, " units"]
    written: Int[np.ndarray, " units"]


class _Part(NamedTuple):
    """What the units of a family own of one axis of a leaf."""

    indices: Int[np.ndarray, "units n"]
    read: bool
    written: bool


class _Family(NamedTuple):
    """Units that own as many indices of the same axes, used in the same way; in the order of the first of these axes.

    Attributes:
        kind: of the units.
        writer: the number of the leaf that first writes them.
        parts: (number of the leaf, axis) -> what they own there.
    """

    kind: str
    writer: int
    parts: dict[tuple[int, int], _Part]


def _families(coupled: CoupledAxes) -> list[_Family]:
    """In the order in which they are written."""
    flags = {name: _marked(coupled, name, of_classes=True) < _NEVER for name in _KIND_OF}
    owned = _owned(coupled)
    numbers = _family_numbers(owned, list(flags.values()))
    parts: dict[int, dict[tuple[int, int], _Part]] = {}
    writers: dict[int, tuple[int, int, int]] = {}
    kinds: dict[int, str] = {}
    for place, each in owned.items():
        for number in np.unique(numbers[each.units]).tolist():
            here = numbers[each.units] == number
            indices = each.indices[np.repeat(here, each.counts)].reshape(here.sum(), -1)
            read, written = (int(first[here].min()) for first in (each.read, each.written))
            parts.setdefault(number, {})[place] = _Part(indices, read < _NEVER, written < _NEVER)
            first = written, int(indices.min()), place[0]
            writers[number] = min(writers.get(number, first), first)
            unit = each.units[here][0]
            kinds[number] = next((kind for name, kind in _KIND_OF.items() if flags[name][unit]), "columns")
    ordered = sorted(parts, key=lambda number: writers[number])
    return [_Family(kinds[number], writers[number][2], parts[number]) for number in ordered]


def _owned(coupled: CoupledAxes) -> dict[tuple[int, int], _Owned]:
    classes, owned = coupled.classes, {}
    read, written = (_marked(coupled, name, of_classes=False) for name in ("read", "written"))
    for place, along in coupled.axes.items():
        indices = np.flatnonzero(~classes.is_pinned(along))
        if not len(indices):
            continue
        units = classes.find(along[indices])
        order = np.argsort(units, kind="stable")
        units, starts, counts = np.unique(units[order], return_index=True, return_counts=True)
        entries = along[indices[order]]
        first = [np.minimum.reduceat(mark[entries], starts) for mark in (read, written)]
        owned[place] = _Owned(units, counts, indices[order], *first)
    return owned


def _family_numbers(
    owned: Mapping[tuple[int, int], _Owned], flags: Sequence[Bool[np.ndarray, " indices"]]
) -> Int[np.ndarray, " indices"]:
    """The number of the family of every class: it is split, axis by axis, where its units differ."""
    numbers = np.zeros(len(flags[0]), np.int64)
    for flag in flags:
        numbers = 2 * numbers + flag
    following = 1 << len(flags)
    for each in owned.values():
        uses = 2 * (each.read < _NEVER) + (each.written < _NEVER)
        keys = (numbers[each.units] * (each.counts.max() + 1) + each.counts) * 4 + uses
        numbers[each.units] = following + np.unique(keys, return_inverse=True)[1]
        following = int(numbers[each.units].max()) + 1
    return numbers


def _marked(coupled: CoupledAxes, name: str, *, of_classes: bool) -> Int[np.ndarray, " indices"]:
    """When indices, or any of their class, were first marked."""
    first = np.full(coupled.classes.size, _NEVER)
    for step, indices in reversed(coupled.marks.get(name, ())):
        indices = indices[indices >= 0]
        first[coupled.classes.find(indices) if of_classes else indices] = step
    return first


def _groups(family: _Family, paths: Sequence[str]) -> Iterator[UnitGroup]:
    """Its units, in groups in each of which they lie side by side in every leaf; named as the leaf that writes them."""
    parts, hidden = family.parts, family.kind == "hidden"
    gated = {place: part.written or not part.read if hidden else part.read for place, part in parts.items()}
    if not any(gated.values()) or all(part.read and not part.written for part in parts.values()):
        return  # Nothing reads them, or what is read is no output of any leaf.
    neighbours = np.logical_and.reduce([_neighbours(part.indices) for part in parts.values()])
    bounds = [0, *(np.flatnonzero(~neighbours) + 1).tolist(), len(neighbours) + 1]
    for start, end in itertools.pairwise(bounds):
        slices = tuple(
            UnitSlices(path=paths[leaf], axis=axis, offset=offset, width=width, repeat=repeat, gated=gated[leaf, axis])
            for (leaf, axis), part in sorted(parts.items())
            for offset, width, repeat in _runs(part.indices[start], end - start)
        )
        yield UnitGroup(name=paths[family.writer], kind=family.kind, count=end - start, slices=slices)


def _neighbours(indices: Int[np.ndarray, "units n"]) -> Bool[np.ndarray, " pairs"]:
    """Whether each run of a unit's indices is followed by one as long of the next unit."""
    joined = np.diff(indices, axis=1) == 1
    starts = np.concatenate([np.ones((len(indices), 1), bool), ~joined], axis=1)
    runs = np.cumsum(starts.reshape(-1)) - 1
    widths = np.bincount(runs)[runs].reshape(indices.shape)
    alike = (starts[1:] == starts[:-1]).all(axis=1)
    return alike & (indices[1:] - indices[:-1] == widths[:-1]).all(axis=1)


def _runs(indices: Int[np.ndarray, " n"], count: int) -> list[tuple[int, int, int]]:
    """`(offset, width, repeat)` of the slices whose first unit owns these indices."""
    slices: list[tuple[int, int, int]] = []
    for run in np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1):
        start, width = int(run[0]), len(run)
        if slices:
            offset, before, repeat = slices[-1]
            if before == width and start == offset + repeat * count * width:
                slices[-1] = offset, width, repeat + 1
                continue
        slices.append((start, width, 1))
    return slices


def _named(groups: Sequence[UnitGroup]) -> list[UnitGroup]:
    """With numbers behind names that several have."""
    counts, numbers = Counter(group.name for group in groups), Counter[str]()
    named = []
    for group in groups:
        number = numbers[group.name]
        numbers[group.name] += 1
        named.append(dataclasses.replace(group, name=f"{group.name}#{number}") if counts[group.name] > 1 else group)
    return named


def _reasons(
    coupled: CoupledAxes, paths: Sequence[str], groups: Sequence[UnitGroup], *, expected: bool = True
) -> dict[str, str]:
    """What is said of the axes of each leaf.

    Args:
        coupled: the axes.
        paths: of the leaves.
        groups: of all kinds.
        expected: also what is in the nature of the model. Otherwise, only why axes stay that are not followed.
    """
    kinds = {(part.path, part.axis): group.kind for group in groups for part in group.slices}
    texts: dict[str, list[str]] = {}
    for (leaf, axis), indices in coupled.axes.items():
        kind = kinds.get((paths[leaf], axis))
        for reason in coupled.classes.reasons(indices):
            if reason is not None and (expected or not reason.expected):
                text = reason.text
            elif reason is None and expected:
                text = f"its units are of the kind {kind!r}" if kind else "no parameter writes it, or none reads it"
            else:
                continue
            texts.setdefault(paths[leaf], []).append(f"axis {axis}: {text}")
    return {path: "; ".join(each) for path, each in texts.items()}


_NEVER = np.iinfo(np.int64).max
_KIND_OF = {"reduced": "hidden", "heads": "heads", "channels": "channels"}
"""What happens to the units -> their kind; the first of these counts."""
