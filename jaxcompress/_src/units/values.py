"""What gates come to after training: their numbers, and which units they keep."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.solvers.hard_concrete import STANDARD, Form, HardConcrete, deterministic_gates, soft_gates
from jaxcompress._src.units.group import UnitGroup


def gate_values(
    log_alpha: Mapping[str, Any],
    *,
    form: Form = "louizos",
    keep: Mapping[str, Any] | None = None,
    distribution: HardConcrete = STANDARD,
) -> dict[str, jax.Array]:
    """The deterministic gates, by name; to be multiplied into the weights by `multiply_gates`.

    Args:
        log_alpha: `state.trainable["log_alpha"]`.
        form: see `deterministic_gates`.
        keep: name -> bool: units that were chosen otherwise, by `units_within` say. Those left out are zero, the others
            have their `soft_gates`. Names without an entry keep the deterministic form.
        distribution: constants.

    Example:
        >>> gate_values({"rows": jnp.array([4.0, 4.0])}, keep={"rows": [True, False]})
        {'rows': Array([1., 0.], dtype=float32)}
    """
    values = {}
    for name, location in log_alpha.items():
        if keep is None or name not in keep:
            values[name] = deterministic_gates(location, form=form, distribution=distribution)
        else:
            soft = soft_gates(location, form=form, distribution=distribution)
            values[name] = jnp.where(jnp.asarray(keep[name], bool), soft, 0.0)
    return values


def kept_units(
    log_alpha: Mapping[str, Any],
    groups: Sequence[UnitGroup],
    *,
    form: Form = "louizos",
    distribution: HardConcrete = STANDARD,
) -> dict[str, np.ndarray]:
    """The units whose deterministic gate is not zero: what `units.remove_units` takes as `keep`.

    Args:
        log_alpha: `state.trainable["log_alpha"]`.
        groups: of units.
        form: see `deterministic_gates`.
        distribution: constants.

    Returns:
        name -> bool (count,).

    Example:
        >>> from jaxcompress._src.units.group import UnitSlices
        >>> rows = UnitGroup(name="rows", count=3, slices=(UnitSlices(path="w", axis=0, gated=True),))
        >>> kept_units({"rows": jnp.array([4.0, -4.0, 0.0])}, [rows])
        {'rows': array([ True, False,  True])}
    """
    own = {group.name: log_alpha[group.name] for group in groups}
    return {
        name: np.asarray(value) > 0 for name, value in gate_values(own, form=form, distribution=distribution).items()
    }
