"""What a penalty is, and the plain one: so much for every expected weight."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress._src.tree.maps import leaves_by_path, map_with_path
from jaxcompress._src.types import Params, plain
from jaxcompress._src.units.costs import unit_costs
from jaxcompress._src.units.group import UnitGroup, by_name, check_known
from jaxcompress._src.units.slices import sum_units


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gated:
    """What a penalty may look at.

    Attributes:
        params: the parameters before the gates.
        groups: units with gates.
        probabilities: P(z != 0): name of a group -> (count,), or path of a leaf whose weights have gates -> its shape.
        step: number of updates so far.
        loss: of the task, differentiable.
    """

    params: Params
    groups: tuple[UnitGroup, ...]
    probabilities: Mapping[str, Any]
    step: Any
    loss: Any


class Penalty(NamedTuple):
    """A price of open gates, as three pure functions.

    Attributes:
        init: `gated -> multipliers`, a tree of float32, trained with the gates; checks what is asked, outside `jit`.
        value: `(gated, multipliers) -> scalar`, added to the loss.
        project: `multipliers -> multipliers`: constraints on them, after every optimizer step.
        shortfall: `gated -> message`, of gates that are open or not (probabilities 0 and 1), after training: in which
            way they are not what was asked for; empty if they are.
    """

    init: Callable[[Gated], Any]
    value: Callable[[Gated, Any], Any]
    project: Callable[[Any], Any] = lambda multipliers: multipliers
    shortfall: Callable[[Gated], str] = lambda gated: ""


def lambda_penalty(strength: float | Mapping[str, float], *, examples: int, weight_decay: float = 0.0) -> Penalty:
    """Σ P(z != 0) (λ size + weight_decay / 2 ‖w‖²) / N over all gates.

    Size and w are those of the weights that the gate multiplies: a weight behind two gates counts with both of them.

    Args:
        strength: λ; or by name, or kind, of a group, or path of a leaf with gated weights. Those left out: 0.
        examples: N, the number of training examples.
        weight_decay: for the weights behind a gate; do not let the optimizer decay them again.

    Raises:
        ValueError: a negative argument, or `examples` below 1; from `init`: `strength` names nothing that exists.

    Example:
        >>> from jaxcompress.structured import UnitSlices
        >>> rows = UnitGroup(name="rows", count=2, slices=(UnitSlices(path="w", axis=0, gated=True),))
        >>> params, probabilities = {"w": jnp.ones((2, 3))}, {"rows": jnp.array([1.0, 0.5])}
        >>> gated = Gated(params=params, groups=(rows,), probabilities=probabilities, step=0, loss=0.0)
        >>> float(lambda_penalty(2.0, examples=3).value(gated, ()))
        3.0

    References:
        Louizos, Welling and Kingma 2018, equation 9 and section 2.3, as its released code weighs them.
    """
    values = strength.values() if isinstance(strength, Mapping) else (strength,)
    # Not `< 0`: NaN is refused as well.
    if not all(value >= 0 for value in (*values, weight_decay)):
        raise ValueError(f"`strength` and `weight_decay` must not be negative, got {strength} and {weight_decay}.")
    if examples < 1:
        raise ValueError(f"`examples` must be at least 1, got {examples}.")

    def init(gated: Gated) -> tuple[()]:
        if isinstance(strength, Mapping):
            kinds = {group.kind for group in gated.groups if group.kind}
            check_known(strength, {*gated.probabilities, *kinds}, "strength")
        return ()

    def value(gated: Gated, multipliers: Any) -> jax.Array:
        del multipliers
        groups = {group.name: group for group in gated.groups}
        touched = {part.path for group in gated.groups for part in group.gated} | set(gated.probabilities)
        squares = map_with_path(lambda path, leaf: _squares(leaf) if path in touched else leaf, gated.params)
        of_leaves = leaves_by_path(squares)
        total = jnp.zeros((), jnp.float32)
        for name, probability in gated.probabilities.items():
            group = groups.get(name)
            price = by_name(strength, name, gated.groups, 0.0)
            size = unit_costs(dataclasses.replace(group, slices=group.gated), gated.params) if group else 1.0
            norm = sum_units(group, squares, gated_only=True) if group else of_leaves[name]
            total = total + jnp.sum(probability * (price * size + 0.5 * weight_decay * norm))
        return total / examples

    return Penalty(init, value)


def _squares(leaf: Any) -> jax.Array:
    return jnp.square(plain(leaf).astype(jnp.float32))
