"""Learned rounding: up or down, block after block, so that each block's outputs stay what they were."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress._src.arrays.packed import PackedArray
from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.calibration.blocks import Blocks, blocks_of
from jaxcompress._src.calibration.flat_program import View, flat_program
from jaxcompress._src.calibration.leaf_part import (
    Entry,
    LeafPart,
    Overlap,
    entry_of,
    is_partial,
    laid_over,
    overlap_of,
)
from jaxcompress._src.calibration.segments import COMPILED, Model, Piece, by_shape, evaluate
from jaxcompress._src.meshes import on_auto_axes, on_auto_axes_as
from jaxcompress._src.quantization.rounding_info import RoundingInfo
from jaxcompress._src.quantization.soft_rounding import choice_of, decision, first_state, hard_leaf, soft_leaf
from jaxcompress._src.trace.layouts import layouts as traced_layouts
from jaxcompress._src.tree.maps import leaves_by_path, leaves_with_paths, with_leaves
from jaxcompress._src.types import Params, plain
from jaxcompress._src.weights.matrices import checked_weight


class RoundingSchedule(NamedTuple):
    """How a block is learned.

    Attributes:
        steps: of Adam, on one batch each, in turn.
        rate: learning rate of what decides between two codes.
        scale_rate: of the logarithms of the scales, relative to `rate`; 0 leaves them.
        strength: of the penalty that drives decisions to 0 or 1.
        warm_up: share of the steps without it.
        sharpness: exponents of the penalty, first and last.
    """

    steps: int = 200
    rate: float = 1e-2
    scale_rate: float = 0.05
    strength: float = 0.01
    warm_up: float = 0.2
    sharpness: tuple[float, float] = (20.0, 2.0)


DEFAULT = RoundingSchedule()


def learned_rounding(
    apply: Callable[..., Any],
    params: Params,
    rounded: Params,
    batches: Iterable[tuple[Any, ...]],
    *,
    together: Callable[[str], Any],
    schedule: RoundingSchedule = DEFAULT,
    row_mask: Callable[..., Any] | None = None,
) -> tuple[Params, dict[str, RoundingInfo]]:
    """AdaRound, block by block, from weights that are rounded already.

    Every weight may keep its code c or take the neighbour on the side of the dense weight, c ± h, h in {0, 1}. While it
    is learned, h = clip(1.2 σ(v) - 0.1, 0, 1), which starts where c ± h is nearest to the dense weight, and the penalty
    strength mean(1 - |2h - 1|^β), with β falling, makes it a decision. The loss is the squared error of what the block
    passes on, over its variance, between the dense model on dense inputs and the rounded one on those that the rounded
    blocks before it give. A block that ends up worse than it began stays as it was.

    Args:
        apply: `(params, *inputs) -> outputs`. The last block is learned on all outputs: return hidden states, say,
            rather than the two logits of a classifier.
        params: the dense tree.
        rounded: the same with `QuantizedArray` leaves (from `quantize`, `gptq`, `reconstruct`), and other biases, if
            they changed.
        batches: tuples of arrays; all are kept, with what each block passes on.
        together: path of a rounded leaf -> its block, such as the number of the layer; `path[i]` for each entry of a
            stack (the layers of a scan). Blocks are cut where the next one's first leaf is used. A stack whose entries
            share a scale stays one leaf, in one block.
        schedule: steps, rates, penalty.
        row_mask: `(*inputs) -> weights` of shape (B, L), say: what each row counts, 0 for padding, in values with these
            leading axes; by default all count alike.

    Returns:
        `(params, info)`: as `rounded`, with other codes and scales, and a `RoundingInfo` by path (`path[i]` for each
        entry of a stack) with the relative output error of the leaf's block: ||Y' - Y|| / ||Y||, Y being what it passes
        on.

    Raises:
        ValueError: no batches, or with NaN; no rounded leaf, one with a table of levels or sparse codes, or that is not
            the same in `params`; options out of range. Names the leaf.

    Example:
        >>> from jaxcompress.quantization import QuantSpec, quantize
        >>> params = {"w": jnp.array([[0.7], [0.55], [7.0]])}
        >>> x = jnp.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0], [4.0, 4.1, 0.0]])
        >>> start, _ = quantize(params, QuantSpec(bits=4))
        >>> schedule = RoundingSchedule(rate=0.05, steps=400)
        >>> small, info = learned_rounding(
        ...     lambda p, x: x @ p["w"], params, start, [(x,)], together=str, schedule=schedule
        ... )
        >>> start["w"].codes().ravel().tolist(), int(small["w"].codes()[:2].sum())
        ([1, 1, 7], 1)

    References:
        Nagel et al. 2020, "Up or down? Adaptive rounding for post-training quantization"; Li et al. 2021, "BRECQ:
        pushing the limit of post-training quantization by block reconstruction".
    """
    all_batches = [tuple(jax.tree.map(jnp.asarray, batch)) for batch in batches]
    leaves, dense = leaves_by_path(rounded), leaves_by_path(params)
    paths = [path for path, leaf in leaves.items() if isinstance(leaf, QuantizedArray)]
    _check(all_batches, paths, leaves, schedule)
    _check_dense(paths, leaves, dense)
    rows = [None if row_mask is None else jnp.maximum(jnp.asarray(row_mask(*b), jnp.float32), 0.0) for b in all_batches]
    stacks = _stacks(traced_layouts(apply, params, *all_batches[0]), {path: leaves[path] for path in paths})

    def trace(batch: Any) -> Blocks:
        program = flat_program(apply, params, batch, stacks=[path for path, sizes in stacks.items() if sizes])
        return blocks_of(program, stacks, together=together)

    programs = by_shape(all_batches, trace)
    target, current = (Model(tree, [blocks.segments for blocks in programs], all_batches) for tree in (params, rounded))
    entries: dict[str, dict[Entry, QuantizedArray]] = {path: {} for path in paths}
    info = {}
    for number, parts in enumerate(programs[0].parts):
        target.run(number)
        start = [_entry(leaves[part.path], part) for part in parts]
        block = _block(number, programs, current, target, rows)
        learned, before, after = _learn(block, start, [entry_of(dense[p.path], p.entry) for p in parts], schedule)
        if not np.isfinite(before):
            raise ValueError(f"What the block of leaf {parts[0].name!r} passes on holds NaN or Inf.")
        for part, leaf in zip(parts, learned, strict=True):
            entries[part.path][part.entry] = leaf
            info[part.name] = RoundingInfo.of(leaf, error_before=before, error=after)
            current.put(part.path, part.entry, jnp.asarray(plain(leaf)))
        current.run(number)
    return with_leaves(rounded, {path: _joined(stacks[path], entries[path]) for path in paths}), info


def _stacks(layouts: Params, leaves: Mapping[str, QuantizedArray]) -> dict[str, tuple[int, ...]]:
    """The sizes of the leading axes of each leaf that are stacked; none where it cannot be cut there, part by part."""
    axes = {path: layout.stack_axes for path, layout in leaves_with_paths(layouts)}
    stacks = {}
    for path, leaf in leaves.items():
        depth = len(axes[path])
        leading = {part.shape[:depth] for part in jax.tree.leaves(leaf)}
        can_be_cut = axes[path] == tuple(range(depth)) and leading == {leaf.shape[:depth]}
        stacks[path] = tuple(leaf.shape[:depth]) if can_be_cut else ()
    return stacks


@on_auto_axes
def _entry(leaf: QuantizedArray, part: LeafPart) -> QuantizedArray:
    """One entry of a compressed stack, cut part by part."""
    index = tuple(place for _, place in part.entry)
    return jax.tree.map(lambda part: part[index], leaf) if index else leaf


@on_auto_axes
def _joined(sizes: tuple[int, ...], entries: Mapping[Entry, QuantizedArray]) -> QuantizedArray:
    """A leaf of its entries, or of all of it."""
    if () in entries:
        return entries[()]
    parts = [entries[entry] for entry in sorted(entries)]
    return jax.tree.map(lambda *entries: jnp.stack(entries).reshape(*sizes, *entries[0].shape), *parts)


class _Task(NamedTuple):
    """How a block computes on batches of one shape. Hashable: equal blocks share a compilation.

    Attributes:
        piece: its equations.
        overlaps: for each leaf that these read, which parts of the block are in it, by number, and where.
        places: of what it passes on, among what it writes.
        count: of what it passes on, what it leaves as it is included.
    """

    piece: Piece
    overlaps: tuple[tuple[tuple[int, Overlap], ...], ...]
    places: tuple[int, ...]
    count: int


class _Batch(NamedTuple):
    """A block on one batch.

    Attributes:
        task: how it computes.
        operands: what goes into it in the rounded model.
        targets: what it should write.
        rows: what each row counts; None: the same.
        passed: error of what it leaves as it is.
    """

    task: _Task
    operands: Any
    targets: list[Any]
    rows: Any
    passed: float


def _block(number: int, programs: Sequence[Blocks], current: Model, target: Model, rows: Sequence[Any]) -> list[_Batch]:
    """A block on every batch, between the models that stand before and behind it."""
    batches: list[_Batch] = []
    at_hand: dict[Any, Any] = {}
    for batch, blocks in enumerate(programs):
        segment, outputs = blocks.segments.segments[number], blocks.outputs[number]
        overlaps = [_overlaps(view, blocks.parts[number], current.leaves[view.path].ndim) for view in segment.views]
        for view, pairs in zip(segment.views, overlaps, strict=True):
            if any(not is_partial(overlap) for _, overlap in pairs):
                # All of it is learned: nobody reads what it is so far.
                at_hand[view.path, view.entry] = None
        written = [var for var in outputs if var in segment.writes]
        places = tuple(segment.writes.index(var) for var in written)
        passed = [var for var in outputs if var not in written]
        values, wanted = ([model.values[batch][var] for var in passed] for model in (current, target))
        batches.append(
            _Batch(
                task=_Task(segment.piece, tuple(overlaps), places, max(len(outputs), 1)),
                operands=current.operands(number, batch, at_hand),
                targets=[target.values[batch][var] for var in written],
                rows=rows[batch],
                passed=float(_energies(values, wanted, rows[batch], centred=False)),
            )
        )
    return batches


def _overlaps(view: View, parts: Sequence[LeafPart], ndim: int) -> tuple[tuple[int, Overlap], ...]:
    """Which parts a leaf of some axes is made of as the program reads it, by number, and where."""
    numbered = [(number, part.entry) for number, part in enumerate(parts) if part.path == view.path]
    pairs = [(number, overlap_of(view.entry, entry, ndim)) for number, entry in numbered]
    return tuple((number, overlap) for number, overlap in pairs if overlap is not None)


def _check(all_batches: list[Any], paths: list[str], leaves: Mapping[str, Any], schedule: RoundingSchedule) -> None:
    if not all_batches:
        raise ValueError("`batches` is empty: rounding needs inputs.")
    if not paths:
        raise ValueError("No leaf of `rounded` is a `QuantizedArray`: quantize first.")
    for path in paths:
        if leaves[path].levels is not None or not isinstance(leaves[path].data, PackedArray | jax.Array):
            raise ValueError(f"Leaf {path!r} has a table of levels, or sparse codes: only dense integers are learned.")
        if leaves[path].partial is not None:
            raise ValueError(f"Leaf {path!r} has groups that are not whole: quantize it without `partial_groups`.")
    if schedule.steps < 0 or not schedule.rate > 0 or schedule.scale_rate < 0 or schedule.strength < 0:
        raise ValueError(f"`schedule` needs a positive rate, and steps and strengths of at least 0, got {schedule}.")


def _check_dense(paths: list[str], leaves: Mapping[str, Any], dense: Mapping[str, Any]) -> None:
    for path in paths:
        if path not in dense or tuple(dense[path].shape) != tuple(leaves[path].shape):
            found = f"has shape {tuple(dense[path].shape)}" if path in dense else "is missing"
            raise ValueError(f"Leaf {path!r} is {tuple(leaves[path].shape)} in `rounded`, but {found} in `params`.")
        checked_weight(path, dense[path])


def _learn(
    block: list[_Batch], leaves: list[QuantizedArray], dense: list[Any], schedule: RoundingSchedule
) -> tuple[list[QuantizedArray], float, float]:
    """The block's leaves, and its relative error before and after."""
    choices = [choice_of(leaf, weights) for leaf, weights in zip(leaves, dense, strict=True)]
    state: Any = [first_state(choice, weights) for choice, weights in zip(choices, dense, strict=True)]
    moments = optax.adam(schedule.rate).init(state)
    for i in range(schedule.steps):
        batch = block[i % len(block)]
        share = np.float32(i / schedule.steps)
        data = batch.operands, batch.targets, batch.rows
        state, moments = _step(state, moments, choices, data, share, task=batch.task, schedule=schedule)
    learned = [hard_leaf(choice, each, schedule.scale_rate) for choice, each in zip(choices, state, strict=True)]
    before, after = _error(block, leaves), _error(block, learned)
    return (learned, before, after) if after < before else (leaves, before, before)


# The leaf inside a choice is a pytree with static fields: it may be an argument.
@functools.partial(jax.jit, static_argnames=("task", "schedule"), compiler_options=COMPILED)
def _step(
    state: Any, moments: Any, choices: Any, data: Any, share: Any, *, task: _Task, schedule: RoundingSchedule
) -> tuple[Any, Any]:
    """One step of Adam."""

    def loss(state: Any) -> Any:
        soft = [soft_leaf(choice, values, schedule.scale_rate) for choice, values in zip(choices, state, strict=True)]
        lost = _lost(task, soft, *data, centred=True)
        ready = (share - schedule.warm_up) / max(1 - schedule.warm_up, 1e-6)
        first, last = schedule.sharpness
        power = last + (first - last) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(ready, 0.0, 1.0)))
        open_ = [1 - jnp.abs(2 * decision(values["v"]) - 1) ** power for values in state]
        penalty = sum(part.sum() for part in open_) / max(sum(part.size for part in open_), 1)
        return lost / task.count + jnp.where(ready > 0, schedule.strength, 0.0) * penalty

    updates, moments = optax.adam(schedule.rate).update(jax.grad(loss)(state), moments)
    return optax.apply_updates(state, updates), moments


def _error(block: list[_Batch], leaves: Sequence[QuantizedArray]) -> float:
    arrays, errors = [jnp.asarray(plain(leaf)) for leaf in leaves], []
    for batch in block:
        lost = float(_measured(batch.task, arrays, batch.operands, batch.targets, batch.rows))
        errors.append((lost + batch.passed) / batch.task.count)
    return float(np.sqrt(np.mean(errors)))


def _lost(task: _Task, arrays: Sequence[Any], operands: Any, targets: Any, rows: Any, *, centred: bool) -> Any:
    """The errors of what a block writes, summed up."""
    weights, values, consts = operands
    parts = []
    for part, overlaps in zip(weights, task.overlaps, strict=True):
        for number, overlap in overlaps:
            part = laid_over(part, arrays[number], overlap)
        parts.append(part)
    written = evaluate(task.piece, parts, values, consts)
    return _energies([written[place] for place in task.places], targets, rows, centred=centred)


_measured = jax.jit(functools.partial(_lost, centred=False), static_argnums=0, compiler_options=COMPILED)


def _energies(values: Sequence[Any], targets: Sequence[Any], rows: Any, *, centred: bool) -> Any:
    """Squared errors, each over the target's energy (about its mean), summed up."""
    pairs = zip(values, targets, strict=True)
    return sum(
        (on_auto_axes_as([], _energy, output, wanted, rows, centred) for output, wanted in pairs), jnp.float32(0)
    )


def _energy(output: Any, wanted: Any, rows: Any, centred: bool) -> Any:
    wanted = wanted.astype(jnp.float32)
    weight = jnp.ones((), jnp.float32)
    if rows is not None and wanted.shape[: rows.ndim] == rows.shape:
        weight = rows.reshape(*rows.shape, *(1,) * (wanted.ndim - rows.ndim))
    weight = jnp.broadcast_to(weight, wanted.shape)
    total = jnp.maximum(weight.sum(), jnp.finfo(jnp.float32).tiny)
    mean = jnp.sum(weight * wanted) / total if centred else 0.0
    variance = jnp.maximum(jnp.sum(weight * jnp.square(wanted - mean)), jnp.finfo(jnp.float32).tiny)
    return jnp.sum(weight * jnp.square(output.astype(jnp.float32) - wanted)) / variance
