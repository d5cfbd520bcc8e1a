"""A budget of bits, spread over the leaves where it helps most."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.quantization.round_to_nearest import quantize_array
from jaxcompress._src.quantization.spec import QuantSpec
from jaxcompress._src.solvers.budget import cheapest_choice
from jaxcompress._src.trace.layout import LeafLayout
from jaxcompress._src.tree.maps import leaves_by_path, leaves_with_paths, map_with_path, with_leaves
from jaxcompress._src.tree.unselected import map_selected
from jaxcompress._src.types import Params, Selector
from jaxcompress._src.weights.matrices import checked_fisher, checked_weight
from jaxcompress._src.weights.selection import selected_layouts

Counted = Literal["stored", "codes"]
"""What a mean of bits counts: scales and zero points too, or codes alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormatSensitivity:
    """What each format costs each leaf; the trees are partial.

    Attributes:
        specs: the formats.
        losses: float64 vectors, one entry for each format.
        stored_bits: int64 vectors, one entry for each format.
        sizes: how many weights the leaf has.
    """

    specs: tuple[QuantSpec, ...]
    losses: Params
    stored_bits: Params
    sizes: Params


@on_auto_axes
def fisher_sensitivity(
    params: Params,
    fisher: Params,
    specs: Sequence[QuantSpec],
    *,
    select: Selector | None = None,
    layouts: Params | None = None,
) -> FormatSensitivity:
    """½ Σ F (w - q(w))² of each leaf in each format: how much the loss rises, to second order.

    Args:
        params: the tree.
        fisher: from `calibration.fisher`: one pass of gradients.
        specs: the formats.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`.

    Returns:
        The table; see `allocate_bits`.

    Raises:
        ValueError: no formats; a leaf that holds NaN or Inf, or whose axes a group size does not divide, or without
            Fisher information of its shape, finite and not negative: names it.

    Example:
        >>> params = {"a": jnp.array([[1.0], [0.3]]), "b": jnp.array([[1.0], [0.3]])}
        >>> fisher = {"a": jnp.ones((2, 1)), "b": 9 * jnp.ones((2, 1))}
        >>> table = fisher_sensitivity(params, fisher, [QuantSpec(bits=2), QuantSpec(bits=8)])
        >>> table.losses["a"].round(3).tolist(), table.losses["b"].round(3).tolist()
        ([0.101, 0.0], [0.905, 0.0])
    """

    def loss(path: str, weight: jax.Array, leaf: QuantizedArray) -> float:
        information = checked_fisher(fisher, {path: weight.shape})[path]
        return float(_second_order(weight, leaf.materialize(), information))

    return _table(params, specs, loss, select=select, layouts=layouts)


def loss_sensitivity(
    loss: Callable[[Params, Any], jax.Array],
    params: Params,
    batches: Sequence[Any],
    specs: Sequence[QuantSpec],
    *,
    select: Selector | None = None,
    layouts: Params | None = None,
) -> FormatSensitivity:
    """The mean loss with one leaf in one format and all others whole.

    That is leaves times formats evaluations on every batch, all by one compiled function.

    Args:
        loss: `(params, batch) -> scalar`.
        params: plain arrays.
        batches: each counts the same; not the test set.
        specs: the formats.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`.

    Returns:
        The table; see `allocate_bits`.

    Raises:
        ValueError: as for `fisher_sensitivity`; no batches; a loss that is not finite.

    Example:
        >>> params = {"a": jnp.array([[1.0], [0.3]]), "b": jnp.array([[1.0], [0.3]])}
        >>> def loss(p, x):
        ...     return jnp.sum((p["a"] - params["a"]) ** 2) + 9 * jnp.sum((p["b"] - params["b"]) ** 2)
        >>> table = loss_sensitivity(loss, params, [0.0], [QuantSpec(bits=2), QuantSpec(bits=8)])
        >>> table.losses["a"].round(2).tolist(), table.losses["b"].round(2).tolist()
        ([0.2, 0.0], [1.81, 0.0])
    """
    if not batches:
        raise ValueError("`batches` is empty: sensitivities need at least one batch.")
    evaluate = jax.jit(loss)

    def measure(path: str, _: jax.Array, leaf: QuantizedArray) -> float:
        plain = leaf.materialize()
        changed = map_with_path(lambda at, old: plain if at == path else old, params)
        return float(np.mean([float(evaluate(changed, batch)) for batch in batches]))

    return _table(params, specs, measure, select=select, layouts=layouts)


def allocate_bits(
    sensitivity: FormatSensitivity,
    *,
    mean_bits: float | None = None,
    total_bytes: int | None = None,
    counted: Counted = "stored",
) -> Params:
    """The format of each leaf with the least sum of losses under a budget, exactly (`solvers.cheapest_choice`).

    Losses of different leaves are taken to add up.

    Args:
        sensitivity: the table.
        mean_bits: bits per weight over all leaves of the table, at most.
        total_bytes: bytes of them together, at most; stored ones.
        counted: what `mean_bits` counts.

    Returns:
        A partial tree of `QuantSpec`; see `quantize_each`.

    Raises:
        ValueError: not one of `mean_bits` and `total_bytes`; a budget below the smallest formats.

    Example:
        >>> params = {"a": jnp.array([[1.0], [0.3]]), "b": jnp.array([[1.0], [0.3]])}
        >>> fisher = {"a": jnp.ones((2, 1)), "b": 9 * jnp.ones((2, 1))}
        >>> table = fisher_sensitivity(params, fisher, [QuantSpec(bits=2), QuantSpec(bits=8)])
        >>> specs = allocate_bits(table, mean_bits=5.0, counted="codes")
        >>> specs["a"].bits, specs["b"].bits
        (2, 8)

    References:
        NVIDIA Model Optimizer's AutoQuantize states the same problem; here it is solved exactly.
    """
    if (mean_bits is None) == (total_bytes is None):
        raise ValueError(f"Give one of `mean_bits` and `total_bytes`, got {mean_bits} and {total_bytes}.")
    if counted not in get_args(Counted):
        raise ValueError(f"`counted` must be one of {get_args(Counted)}, got {counted!r}.")
    paths = [path for path, _ in leaves_with_paths(sensitivity.losses)]
    losses, stored, sizes = (
        [entry for _, entry in leaves_with_paths(part)]
        for part in (sensitivity.losses, sensitivity.stored_bits, sensitivity.sizes)
    )
    costs = stored
    if mean_bits is not None and counted == "codes":
        costs = [np.array([count * spec.bits for spec in sensitivity.specs]) for count in sizes]
    budget = 8 * total_bytes if total_bytes is not None else math.floor((mean_bits or 0.0) * sum(sizes))
    least = int(sum(min(cost) for cost in costs))
    if least > budget:
        given = f"`total_bytes` is {total_bytes}" if total_bytes is not None else f"`mean_bits` is {mean_bits}"
        need = f"{-(-least // 8)} bytes" if total_bytes is not None else f"{least / sum(sizes):.4g} bits per weight"
        raise ValueError(f"{given}, but the smallest formats of the table need {need} ({counted!r}).")
    options = dict(zip(paths, cheapest_choice(costs, losses, budget).options, strict=True))
    return map_selected(lambda path, _: sensitivity.specs[options[path]], sensitivity.sizes)


@on_auto_axes
def quantize_each(params: Params, specs: Params, *, layouts: Params | None = None) -> Params:
    """Round to nearest, each leaf in its own format.

    Args:
        params: the tree.
        specs: a partial tree of `QuantSpec`.
        layouts: from `trace.layouts`.

    Raises:
        ValueError: a spec for a leaf that `params` does not have; what `quantize` finds wrong with one. Names it.

    Example:
        >>> from jaxcompress.tree import Unselected
        >>> specs = {"bias": Unselected, "kernel": QuantSpec(bits=3)}
        >>> quantize_each({"bias": jnp.ones(2), "kernel": jnp.ones((8, 2))}, specs)["kernel"].bits
        3
    """
    by_path = {path: spec for path, spec in leaves_with_paths(specs) if isinstance(spec, QuantSpec)}
    if unknown := sorted(set(by_path) - {path for path, _ in leaves_with_paths(params)}):
        raise ValueError(f"`specs` names leaf {unknown[0]!r}, which `params` does not have.")
    selected = selected_layouts(params, select=_among(by_path), layouts=layouts)

    def visit(path: str, layout: LeafLayout, leaf: Any) -> QuantizedArray:
        return quantize_array(checked_weight(path, leaf), by_path[path], layout)

    return with_leaves(params, leaves_by_path(map_selected(visit, selected, params)))


def _among(paths: Any) -> Selector:
    return lambda params: map_with_path(lambda path, _: path in paths, params)


def _table(
    params: Params,
    specs: Sequence[QuantSpec],
    loss: Callable[[str, jax.Array, QuantizedArray], float],
    *,
    select: Selector | None,
    layouts: Params | None,
) -> FormatSensitivity:
    if not specs:
        raise ValueError("`specs` is empty: there is nothing to choose from.")
    selected = selected_layouts(params, select=select, layouts=layouts)
    bits: dict[str, np.ndarray] = {}

    def visit(path: str, layout: LeafLayout, leaf: Any) -> np.ndarray:
        weight = checked_weight(path, leaf)
        candidates = [quantize_array(weight, spec, layout) for spec in specs]
        losses = np.array([loss(path, weight, small) for small in candidates])
        if not np.isfinite(losses).all():
            raise ValueError(f"The losses of leaf {path!r} are {losses.tolist()}.")
        bits[path] = np.array([small.nbits for small in candidates], np.int64)
        return losses

    losses = map_selected(visit, selected, params)
    return FormatSensitivity(
        specs=tuple(specs),
        losses=losses,
        stored_bits=map_selected(lambda path, _: bits[path], selected),
        sizes=map_selected(lambda _, __, leaf: math.prod(leaf.shape), selected, params),
    )


@jax.jit
def _second_order(weight: jax.Array, rounded: jax.Array, fisher: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum(fisher * jnp.square(weight.astype(jnp.float32) - rounded.astype(jnp.float32)))
