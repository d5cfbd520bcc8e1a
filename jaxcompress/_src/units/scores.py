"""How much each unit matters. All scores are `{name of the group: float32 (count,)}`; the lowest go first."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.tree.checks import all_finite
from jaxcompress._src.tree.maps import map_with_path
from jaxcompress._src.types import Params, plain
from jaxcompress._src.units.costs import unit_costs
from jaxcompress._src.units.group import UnitGroup, check_groups
from jaxcompress._src.units.slices import multiply_units, sum_units

Gradients = Mapping[str, Float32[Array, "examples units"]]
"""Name of a group -> derivative of each example's loss by the gate of each unit, at gates of 1."""


@on_auto_axes
def magnitude_unit_scores(
    params: Params, groups: Sequence[UnitGroup], *, per_weight: bool = True, gated_only: bool = False
) -> dict[str, Float32[Array, " units"]]:
    """The L2 norm of what a unit owns: sqrt(Σ w²), or sqrt(Σ w² / n) of n weights.

    Args:
        params: the tree.
        groups: the units.
        per_weight: divide by the number of weights, so that units of different sizes can be compared.
        gated_only: only the slices that a gate multiplies, such as the rows of the output kernel.

    Example:
        >>> from jaxcompress.structured import UnitSlices
        >>> group = UnitGroup(name="rows", count=2, slices=(UnitSlices(path="w", axis=0, gated=True),))
        >>> magnitude_unit_scores({"w": jnp.array([[3.0, 4.0], [0.0, 0.0]])}, [group], per_weight=False)
        {'rows': Array([5., 0.], dtype=float32)}

    References:
        Li et al. 2017, "Pruning Filters for Efficient ConvNets" (there with the L1 norm).
    """
    check_groups(groups, params)
    owned = {part.path for group in groups for part in group.slices}

    def square(path: str, leaf: Any) -> Any:
        if path not in owned:
            return leaf
        return jnp.square(jnp.asarray(plain(leaf), jnp.float32))

    squares, scores = map_with_path(square, params), {}
    for group in groups:
        counted = dataclasses.replace(group, slices=group.gated) if gated_only else group
        numbers = np.maximum(unit_costs(counted, params), 1.0) if per_weight else np.ones(group.count)
        scores[group.name] = jnp.sqrt(sum_units(counted, squares) / jnp.asarray(numbers, jnp.float32))
    return scores


def gate_gradients(
    loss: Callable[[Params, Any], jax.Array],
    params: Params,
    groups: Sequence[UnitGroup],
    batches: Iterable[Any],
    *,
    per_example: bool = True,
) -> dict[str, Float32[Array, "examples units"]]:
    """∂L/∂z of the gate z = 1 of every unit: how the loss moves when the unit is turned down.

    Args:
        loss: `(params, batch) -> scalar`, a mean over the rows of the batch. With labels it gives the empirical
            Fisher information; a divergence from the model itself has no gradient here and tells nothing.
        params: the tree.
        groups: the units; each needs gated slices.
        batches: trees of arrays whose first axis is that of the examples.
        per_example: one gradient for each example, one after the other (the loss is then called with batches of one);
            otherwise one for each batch, whose examples may then lie on an explicit mesh axis.

    Returns:
        name -> (examples, units), or (batches, units).

    Raises:
        ValueError: no batches; a group without gated slices; a gradient with NaN or Inf. Names the group.

    Example:
        >>> from jaxcompress.structured import UnitSlices
        >>> group = UnitGroup(name="rows", count=2, slices=(UnitSlices(path="w", axis=0, gated=True),))
        >>> batches = [jnp.array([[1.0, 2.0], [3.0, 4.0]])]
        >>> gate_gradients(lambda p, x: (x @ p["w"]).mean(), {"w": jnp.ones(2)}, [group], batches)
        {'rows': Array([[1., 2.],
               [3., 4.]], dtype=float32)}
    """
    check_groups(groups, params)
    if bare := [group.name for group in groups if not group.gated]:
        raise ValueError(f"Unit group {bare[0]!r} has no gated slices: the loss has no gradient by its units.")

    def of_gates(gates: dict[str, jax.Array], params: Params, batch: Any) -> jax.Array:
        return loss(multiply_units(params, groups, gates), batch)

    @jax.jit
    def gradients(params: Params, batch: Any) -> dict[str, jax.Array]:
        ones = {group.name: jnp.ones((group.count,), jnp.float32) for group in groups}
        if not per_example:
            return jax.tree.map(lambda g: g[None], jax.grad(of_gates)(ones, params, batch))
        # A loop rather than `vmap`: for each example `vmap` would keep a copy of every gated kernel.
        single = jax.grad(of_gates)
        return jax.lax.map(lambda row: single(ones, params, jax.tree.map(lambda x: x[None], row)), batch)

    parts = [gradients(params, batch) for batch in batches]
    if not parts:
        raise ValueError("`batches` is empty: gradients need at least one batch.")
    joined = {group.name: jnp.concatenate([part[group.name] for part in parts]) for group in groups}
    for name, values in joined.items():
        if not all_finite(values):
            raise ValueError(f"The gradient by the gates of {name!r} holds NaN or Inf.")
    return joined


def taylor_unit_scores(gradients: Gradients) -> dict[str, Float32[Array, " units"]]:
    """|mean g|: the first-order change of the loss when the unit is taken out.

    Example:
        >>> taylor_unit_scores({"rows": jnp.array([[1.0, -2.0], [3.0, -4.0]])})
        {'rows': Array([2., 3.], dtype=float32)}

    References:
        Michel et al. 2019, "Are Sixteen Heads Really Better than One?", which has the mean of |g|.
    """
    return {name: jnp.abs(g.mean(axis=0)) for name, g in gradients.items()}


def fisher_unit_scores(gradients: Gradients) -> dict[str, Float32[Array, " units"]]:
    """Mean g²: the diagonal of the Fisher information of the gates, twice the second-order change of the loss.

    Comparable between units of every sort, unlike magnitudes.

    Example:
        >>> fisher_unit_scores({"rows": jnp.array([[1.0, -2.0], [3.0, -4.0]])})
        {'rows': Array([ 5., 10.], dtype=float32)}

    References:
        Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", section 4.1.
    """
    return {name: jnp.square(g).mean(axis=0) for name, g in gradients.items()}
