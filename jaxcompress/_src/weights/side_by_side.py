"""Solving leaves that do not depend on one another: in turn on one device, side by side on the devices of a mesh.

Shape letters: S stack entries (of each group).
"""

import functools
import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcompress._src.meshes import shared_mesh, spread
from jaxcompress._src.weights.matrices import CalibratedLeaf

T = TypeVar("T")

Solve = Callable[..., Any]
"""`(parts, groups, *options) -> results`: trees of arrays whose first axis runs over stack entries, or over each group
of each; of several entries it gives what it would give of each. Compiled by `jax.jit`, with static options."""


def solve_leaves(
    leaves: Sequence[CalibratedLeaf],
    parts: Callable[[CalibratedLeaf], Any],
    solve: Solve,
    finish: Callable[[CalibratedLeaf, Any], T],
    *,
    options: tuple[Hashable, ...] = (),
) -> list[T]:
    """`finish(leaf, solve(parts(leaf), groups, *options))` of each leaf, in order.

    Leaves (or their statistics) on a mesh are spread over its devices, entry by entry: every device solves another
    stack entry, whole, with nothing to say to the others, in as many rounds as it takes. Entries of leaves of one shape
    share rounds and a compilation. A device holds the parts of its entry, its share of those of the others in the
    round, and what the leaves and statistics themselves take there.

    Args:
        leaves: with the statistics of their inputs.
        parts: makes what `solve` is given: arrays whose first axis has an entry for each stack entry and group.
        solve: the method; a function of a module, so that equal leaves share a compilation.
        finish: makes a leaf of the results, which are cut over the mesh in a way of their own.
        options: of `solve`.

    Example:
        >>> from jaxcompress._src.calibration.statistics import InputStatistics
        >>> from jaxcompress._src.weights.matrices import calibrated_leaves
        >>> def double(parts, groups):
        ...     return 2 * parts
        >>> statistics = {"w": InputStatistics(count=jnp.ones(()), gram=jnp.eye(2))}
        >>> leaves = calibrated_leaves({"w": jnp.ones((2, 1))}, statistics, needs="gram", select=None, layouts=None)
        >>> solve_leaves(leaves, lambda leaf: leaf.matrices, double, lambda leaf, solved: solved.tolist())
        [[[[2.0], [2.0]]]]
    """
    results: dict[int, T] = {}
    alike: dict[Any, list[int]] = {}
    for number, leaf in enumerate(leaves):
        mesh = shared_mesh((leaf.weight, leaf.statistics))
        if mesh is None or mesh.size == 1 or not leaf.weight.size:
            results[number] = finish(leaf, solve(parts(leaf), leaf.layout.groups, *options))
        else:
            form = jax.tree.flatten(jax.eval_shape(functools.partial(parts, leaf)))
            shapes = tuple((part.shape[1:], part.dtype) for part in form[0])
            alike.setdefault((mesh, leaf.layout.groups, shapes, form[1]), []).append(number)
    for (mesh, groups, *_), numbers in alike.items():
        solver = functools.partial(_solved_round, mesh=mesh, groups=groups, solve=solve, options=options)
        for number, solved in _in_rounds({number: leaves[number] for number in numbers}, parts, mesh, solver):
            results[number] = finish(leaves[number], solved)
    return [results[number] for number in range(len(leaves))]


def _in_rounds(
    leaves: dict[int, CalibratedLeaf], parts: Callable[[CalibratedLeaf], Any], mesh: Mesh, solver: Callable[..., Any]
) -> Iterator[tuple[int, Any]]:
    """The results of each leaf by its number; a round has as many entries as there are devices."""
    entries = ((number, entry) for number, leaf in leaves.items() for entry in range(leaf.stack // leaf.layout.groups))
    held: dict[int, Any] = {}
    solved: dict[int, list[Any]] = {}
    while members := list(itertools.islice(entries, mesh.size)):
        missing = dict.fromkeys(number for number, _ in members if number not in held)
        held = {number: held[number] for number, _ in members if number in held}
        held |= {number: _cut(parts(leaves[number]), mesh) for number in missing}
        inputs = [_entry(held[number], entry, leaves[number].layout.groups) for number, entry in members]
        # Devices without an entry get any, and do nothing.
        inputs += inputs[:1] * (mesh.size - len(inputs))
        outputs = solver(_one_each(inputs, mesh), np.arange(mesh.size) < len(members))
        for (number, _), output in zip(members, outputs, strict=False):
            solved.setdefault(number, []).append(output)
            if len(solved[number]) * leaves[number].layout.groups == leaves[number].stack:
                pieces = solved.pop(number)
                yield number, pieces[0] if len(pieces) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *pieces)


def _cut(tree: Any, mesh: Mesh) -> Any:
    """Arrays with their stack whole on every device: in one way for all leaves, so that few programs are compiled."""
    return jax.tree.map(lambda part: jax.device_put(part, spread(mesh, part.shape, stack=1)), tree)


def _entry(parts: Any, entry: int, groups: int) -> Any:
    rows = jax.tree.leaves(parts)[0].shape[0]
    return parts if rows == groups else _taken(parts, entry * groups, groups)


@functools.partial(jax.jit, static_argnames="count")
def _taken(parts: Any, start: Any, count: int) -> Any:
    return jax.tree.map(lambda part: jax.lax.dynamic_slice_in_dim(part, start, count), parts)


@functools.partial(jax.jit, static_argnames="mesh")
def _one_each(entries: list[Any], mesh: Mesh) -> Any:
    """Parts of entries -> the same, one entry on each device."""
    whole = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.tree.map(lambda *parts: jax.lax.with_sharding_constraint(jnp.concatenate(parts), whole), *entries)


@functools.partial(jax.jit, static_argnames=("mesh", "groups", "solve", "options"))
def _solved_round(
    parts: Any, busy: Any, *, mesh: Mesh, groups: int, solve: Solve, options: tuple[Hashable, ...]
) -> list[Any]:
    """The results of the entry on each device."""

    def own(parts: Any, busy: Any) -> Any:
        def nothing(parts: Any) -> Any:
            shapes = jax.eval_shape(lambda parts: solve(parts, groups, *options), parts)
            return jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), shapes)

        return jax.lax.cond(busy[0], lambda parts: solve(parts, groups, *options), nothing, parts)

    along = PartitionSpec(mesh.axis_names)
    results = jax.shard_map(own, mesh=mesh, in_specs=along, out_specs=along, check_vma=False)(parts, busy)

    def entries(part: Any) -> list[Any]:
        # Cut another way, in which every device has a share of each entry, or all of it.
        shared = spread(mesh, part.shape, stack=1)
        if math.prod(shared.shard_shape(part.shape)) * mesh.size != part.size:
            shared = NamedSharding(mesh, PartitionSpec())
        return jnp.split(jax.lax.with_sharding_constraint(part, shared), mesh.size)

    columns, treedef = jax.tree.flatten(results)
    return [treedef.unflatten(entry) for entry in zip(*map(entries, columns), strict=True)]
