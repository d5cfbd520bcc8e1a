"""Learned rounding: up or down, block after block, so that each block's outputs stay what they were."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress._src.arrays.packed import PackedArray
from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.calibration.segments import Segment, UnmetError, segments
from jaxcompress._src.calibration.unstack import entries_of, entry_paths, unstacked, whole_stacks
from jaxcompress._src.meshes import on_auto_axes_as
from jaxcompress._src.quantization.rounding_info import RoundingInfo
from jaxcompress._src.quantization.soft_rounding import choice_of, decision, first_state, hard_leaf, soft_leaf
from jaxcompress._src.trace.layouts import layouts as traced_layouts
from jaxcompress._src.tree.maps import leaves_by_path, leaves_with_paths, map_with_path, with_leaves
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
            stack (the layers of a scan). Blocks are cut where the next one's first leaf is used (see
            `calibration.segments`). A stack whose entries share a scale stays one leaf, in one block.
        schedule: steps, rates, penalty.
        row_mask: `(*inputs) -> weights` of shape (B, L), say: what each row counts, 0 for padding, in values with these
            leading axes; by default all count alike.

    Returns:
        `(params, info)`: as `rounded`, with other codes and scales, and a `RoundingInfo` by path (`path[i]` for each
            entry of a stack) with the relative
        output error of the leaf's block: ||Y' - Y|| / ||Y||, Y being what it passes on.

    Raises:
        ValueError: no batches, or with NaN; no rounded leaf, one with a table of levels or sparse codes, or that is not
            the same in `params`; options out of range. Names the leaf.

    Example:
        >>> from jaxcompress.quantization import QuantSpec, quantize
        >>> params = {"w": jnp.array([[0.7], [0.55], [7.0]])}
        >>> x = jnp.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0], [4.0, 4.1, 0.0]])
        >>> start, _ = quantize(params, QuantSpec(bits=4))
        >>> schedule = RoundingSchedule(rate=0.05, steps=400)
        >>> found, info = learned_rounding(
        ...     lambda p, x: x @ p["w"], params, start, [(x,)], together=str, schedule=schedule
        ... )
        >>> start["w"].codes().ravel().tolist(), int(found["w"].codes()[:2].sum())
        ([1, 1, 7], 1)

    References:
        Nagel et al. 2020, "Up or down? Adaptive rounding for post-training quantization"; Li et al. 2021, "BRECQ:
        pushing the limit of post-training quantization by block reconstruction".
    """
    kept = [tuple(jax.tree.map(jnp.asarray, batch)) for batch in batches]
    paths = [path for path, leaf in leaves_with_paths(rounded) if isinstance(leaf, QuantizedArray)]
    _check(kept, paths, leaves_by_path(rounded), schedule)
    _check_dense(paths, leaves_by_path(rounded), leaves_by_path(params))
    rows = [None if row_mask is None else jnp.maximum(jnp.asarray(row_mask(*b), jnp.float32), 0.0) for b in kept]
    dense = map_with_path(lambda _, leaf: jnp.asarray(plain(leaf)), params)
    stacks = _stacks(traced_layouts(apply, dense, *kept[0]), rounded)
    names, dense, split, programs = _by_entry(unstacked(apply, dense), dense, rounded, stacks, together, kept)
    leaves, info = leaves_by_path(split), {}
    current = map_with_path(lambda _, leaf: jnp.asarray(plain(leaf)), split)
    values = [(jax.tree.leaves(batch), jax.tree.leaves(batch)) for batch in kept]
    for k in range(len(programs[0])):
        parts = [program[k] for program in programs]
        own = {path: leaves[path] for path in parts[0].paths}
        targets = [_run(part)(dense, old) for part, (old, _) in zip(parts, values, strict=True)]
        block = _Block(parts, current, [new for _, new in values], targets, rows)
        learned, before, after = _learn(block, own, leaves_by_path(dense), schedule)
        if not np.isfinite(before):
            raise ValueError(f"What the block of leaf {names[next(iter(own))]!r} passes on holds NaN or Inf.")
        leaves |= learned
        current = with_leaves(current, {path: jnp.asarray(plain(leaf)) for path, leaf in learned.items()})
        info |= {names[path]: RoundingInfo.of(leaf, error_before=before, error=after) for path, leaf in learned.items()}
        moved = [_run(part)(current, new) for part, (_, new) in zip(parts, values, strict=True)]
        values = list(zip(targets, moved, strict=True))
    return whole_stacks(rounded, with_leaves(split, leaves)), info


def _by_entry(
    apply: Callable[..., Any],
    dense: Params,
    rounded: Params,
    stacks: dict[str, int],
    together: Callable[[str], Any],
    kept: list[Any],
) -> tuple[dict[str, str], Params, Params, list[list[Segment]]]:
    """Names of the leaves where the layers of a stack are leaves of their own, both trees so, and the blocks.

    Batches of different shapes have programs of their own, cut at the same leaves.
    """
    names, whole, split = entry_paths(rounded, stacks), entries_of(dense, stacks), entries_of(rounded, stacks)
    paths = [path for path, leaf in leaves_with_paths(split) if isinstance(leaf, QuantizedArray)]
    cut = functools.partial(segments, apply, whole, paths=paths, together=lambda path: together(names[path]))
    try:
        return names, whole, split, _by_shape(kept, cut)
    except UnmetError as err:
        # A stack of which the model leaves an entry out is learned as one leaf.
        left = {path: depth for path, depth in stacks.items() if not err.path.startswith(f"{path}/")}
        if left == stacks:
            raise
        return _by_entry(apply, dense, rounded, left, together, kept)


def _stacks(layouts: Params, rounded: Params) -> dict[str, int]:
    """How many leading axes of a rounded leaf are stacked; leaves alone that can be cut there, part by part."""
    axes = {path: layout.stack_axes for path, layout in leaves_with_paths(layouts)}
    found = {}
    for path, leaf in leaves_with_paths(rounded):
        depth = len(axes[path])
        if axes[path] != tuple(range(depth)):
            continue
        leading = isinstance(leaf, QuantizedArray) and [part.shape[:depth] for part in jax.tree.leaves(leaf)]
        if depth and leading and set(leading) == {leaf.shape[:depth]}:
            found[path] = depth
    return found


class _Block(NamedTuple):
    """A block with what goes into it and what should come out, batch by batch."""

    parts: list[Segment]
    params: Params
    inputs: list[Any]
    targets: list[Any]
    rows: list[Any]


def _check(kept: list[Any], paths: list[str], leaves: Mapping[str, Any], schedule: RoundingSchedule) -> None:
    if not kept:
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


def _by_shape(kept: list[Any], cut: Callable[[Any], list[Segment]]) -> list[list[Segment]]:
    known: dict[Any, list[Segment]] = {}
    found = []
    for batch in kept:
        shapes = str(jax.tree.map(lambda x: (x.shape, str(x.dtype)), batch))
        if shapes not in known:
            known[shapes] = cut(batch)
        found.append(known[shapes])
    return found


def _learn(
    block: _Block, own: dict[str, QuantizedArray], dense: Mapping[str, Any], schedule: RoundingSchedule
) -> tuple[dict[str, QuantizedArray], float, float]:
    """The block's leaves, and its relative error before and after."""
    choices = {path: choice_of(leaf, dense[path]) for path, leaf in own.items()}
    state: Any = {path: first_state(choice, dense[path]) for path, choice in choices.items()}
    optimizer = optax.adam(schedule.rate)
    moments = optimizer.init(state)
    losses = {id(part): _loss(part, schedule) for part in block.parts}
    for i in range(schedule.steps if own else 0):
        at = i % len(block.parts)
        share = np.float32(i / schedule.steps)
        data = block.inputs[at], block.targets[at], block.rows[at]
        gradient = losses[id(block.parts[at])](state, choices, block.params, data, share)
        updates, moments = _update(optimizer, gradient, moments)
        state = optax.apply_updates(state, updates)
    before = _error(block, own)
    learned = {path: hard_leaf(choice, state[path], schedule.scale_rate) for path, choice in choices.items()}
    after = _error(block, learned)
    return (learned, before, after) if after < before else (own, before, before)


def _loss(part: Segment, schedule: RoundingSchedule) -> Callable[..., Any]:
    def loss(state: Any, choices: Any, params: Params, data: Any, share: Any) -> Any:
        inputs, targets, rows = data
        soft = {path: soft_leaf(choices[path], state[path], schedule.scale_rate) for path in state}
        lost, total = _energies(part, with_leaves(params, soft), (inputs, targets, rows), centred=True)
        ready = (share - schedule.warm_up) / max(1 - schedule.warm_up, 1e-6)
        first, last = schedule.sharpness
        power = last + (first - last) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(ready, 0.0, 1.0)))
        open_ = [1 - jnp.abs(2 * decision(own["v"]) - 1) ** power for own in state.values()]
        penalty = sum(part.sum() for part in open_) / max(sum(part.size for part in open_), 1)
        return lost / total + jnp.where(ready > 0, schedule.strength, 0.0) * penalty

    return _gradient(loss)


def _gradient(loss: Callable[..., Any]) -> Callable[..., Any]:
    # The leaf inside a choice is a pytree with static fields: it may be an argument.
    return jax.jit(jax.grad(loss))


@functools.partial(jax.jit, static_argnames="optimizer")
def _update(optimizer: Any, gradient: Any, moments: Any) -> Any:
    return optimizer.update(gradient, moments)


def _energies(part: Segment, params: Params, data: tuple[Any, Any, Any], *, centred: bool) -> tuple[Any, Any]:
    """Squared errors of what the block passes on, each over the target's energy (about its mean), and their number."""
    inputs, targets, rows = data
    lost, count = jnp.float32(0), 0
    for found, wanted, counts in zip(part(params, inputs), targets, part.floats, strict=True):
        if counts:
            lost, count = lost + on_auto_axes_as([], _energy, found, wanted, rows, centred), count + 1
    return lost, max(count, 1)


def _energy(found: Any, wanted: Any, rows: Any, centred: bool) -> Any:
    wanted = wanted.astype(jnp.float32)
    weight = jnp.ones((), jnp.float32)
    if rows is not None and wanted.shape[: rows.ndim] == rows.shape:
        weight = rows.reshape(*rows.shape, *(1,) * (wanted.ndim - rows.ndim))
    weight = jnp.broadcast_to(weight, wanted.shape)
    total = jnp.maximum(weight.sum(), jnp.finfo(jnp.float32).tiny)
    mean = jnp.sum(weight * wanted) / total if centred else 0.0
    variance = jnp.maximum(jnp.sum(weight * jnp.square(wanted - mean)), jnp.finfo(jnp.float32).tiny)
    return jnp.sum(weight * jnp.square(found.astype(jnp.float32) - wanted)) / variance


def _error(block: _Block, leaves: Mapping[str, QuantizedArray]) -> float:
    params = with_leaves(block.params, {path: jnp.asarray(plain(leaf)) for path, leaf in leaves.items()})
    found = [
        _measure(part)(params, *data)
        for part, *data in zip(block.parts, block.inputs, block.targets, block.rows, strict=True)
    ]
    return float(np.sqrt(np.mean([float(lost) / total for lost, total in found])))


@functools.lru_cache(maxsize=64)
def _measure(part: Segment) -> Callable[..., Any]:
    return jax.jit(lambda params, *data: _energies(part, params, data, centred=False))


@functools.lru_cache(maxsize=64)
def _run(part: Segment) -> Callable[..., Any]:
    return jax.jit(lambda params, values: part(params, values))
