"""What primitives do to the axes of a value, written once."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxcompress._src.arrays.reshaping import reshape_runs

Run = tuple[list[int], list[int]]
"""(axes of the input, axes of the output) of an equation that, flattened in order, hold the same entries.

One side is empty for axes that come or go. An axis of size 1 may be longer in the output: its entry is repeated.
"""

CASTS = frozenset(
    {"convert_element_type", "reduce_precision", "copy", "copy_p", "stop_gradient", "sharding_constraint", "reshard"}
)
"""Primitives whose output is their input, but for its precision, its place and its derivative; see `is_cast`."""

MOVES = frozenset({"transpose", "squeeze", "broadcast_in_dim", "reshape"})
"""Primitives that move whole axes, see `axis_runs`."""

# fmt: off
ELEMENTWISE = CASTS | {
    "add", "add_any", "sub", "mul", "div", "neg", "max", "min", "rem", "abs", "sign", "floor", "ceil", "round", "clamp",
    "pow", "integer_pow", "square", "sqrt", "rsqrt", "cbrt", "exp", "exp2", "expm1", "log", "log1p", "logistic",
    "sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh",
    "erf", "erfc", "erf_inv", "lgamma", "digamma", "is_finite", "nextafter", "name",
    "lt", "le", "gt", "ge", "eq", "ne", "and", "or", "xor", "not", "select_n",
    "shift_left", "shift_right_logical", "shift_right_arithmetic", "population_count",
}
# fmt: on
"""Primitives whose output at an entry is a function of their inputs at that entry; inputs of length 1 repeat."""

# Some entries along an axis, or all of them in another order: what does not change along it still does not.
_SELECTIONS = frozenset({"slice", "dynamic_slice", "rev"})


def is_cast(eqn: Any) -> bool:
    """Whether the output holds the values of the input, up to their precision."""
    if eqn.primitive.name != "convert_element_type":
        return eqn.primitive.name in CASTS
    # A cast of floats to integers makes other values.
    exact = not jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.inexact)
    return exact or bool(jnp.issubdtype(eqn.params["new_dtype"], jnp.inexact))


def axis_runs(eqn: Any) -> list[Run] | None:
    """How the axes of the first input become those of the output; None if more happens than that axes move.

    Example:
        >>> import jax
        >>> (eqn,) = jax.make_jaxpr(lambda w: w.reshape(6, 5))(jnp.ones((2, 3, 5))).eqns
        >>> axis_runs(eqn)
        [([0, 1], [0]), ([2], [1])]
    """
    name, params = eqn.primitive.name, eqn.params
    if name in CASTS:
        return [([axis], [axis]) for axis in range(eqn.invars[0].aval.ndim)] if is_cast(eqn) else None
    if name == "transpose":
        return [([before], [after]) for after, before in enumerate(params["permutation"])]
    if name == "squeeze":
        rank = eqn.invars[0].aval.ndim
        dropped = {axis % rank for axis in params["dimensions"]}
        left = [axis for axis in range(rank) if axis not in dropped]
        return [([axis], []) for axis in sorted(dropped)] + [([axis], [place]) for place, axis in enumerate(left)]
    if name == "broadcast_in_dim":
        # Equinox has NumPy integers here.
        places = [int(axis) for axis in params["broadcast_dimensions"]]
        new = [axis for axis in range(len(params["shape"])) if axis not in places]
        return [([axis], [place]) for axis, place in enumerate(places)] + [([], [axis]) for axis in new]
    if name == "reshape":
        shape = eqn.invars[0].aval.shape
        return None if params["dimensions"] is not None or 0 in shape else reshape_runs(shape, params["new_sizes"])
    return None


def axes_before(eqn: Any, axes: Sequence[int]) -> tuple[int, ...] | None:
    """The axes of the input that, flattened in order, hold what some axes of the output do; None if none do.

    Example:
        >>> import jax
        >>> (eqn,) = jax.make_jaxpr(lambda w: w.reshape(6, 5))(jnp.ones((2, 3, 5))).eqns
        >>> axes_before(eqn, (0,)), axes_before(eqn, (1,))
        ((0, 1), (2,))
    """
    runs = axis_runs(eqn)
    if runs is None:
        return None
    sizes, new_sizes = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    before, left = [], list(axes)
    while left:
        old, new = next(run for run in runs if left[0] in run[1])
        repeated = len(old) == len(new) == 1 and sizes[old[0]] != new_sizes[new[0]]
        # A part of a run is no run of axes of the input.
        if not old or left[: len(new)] != new or repeated:
            return None
        before += old
        left = left[len(new) :]
    return tuple(before)


def even_axes(eqn: Any, even: frozenset[int]) -> frozenset[int]:
    """The axes along which the output does not change.

    Args:
        eqn: an equation of one input and numbers.
        even: axes along which its first input does not.
    """
    runs = axis_runs(eqn)
    if runs is None:
        return even if eqn.primitive.name in _SELECTIONS else frozenset()
    shape = eqn.invars[0].aval.shape
    return frozenset(
        axis for old, new in runs if all(place in even or shape[place] == 1 for place in old) for axis in new
    )


def free_axes(eqn: Any, side: int) -> list[int]:
    """The axes of an operand of a `dot_general` that are neither summed over nor those of a batch."""
    contracted, batch = eqn.params["dimension_numbers"]
    return [k for k in range(eqn.invars[side].aval.ndim) if k not in contracted[side] and k not in batch[side]]


def operand_axes(eqn: Any, side: int) -> dict[int, int]:
    """Axis of the output of a `dot_general` -> axis of an operand; the output has the batch first, then each side's."""
    batch = eqn.params["dimension_numbers"][1]
    start = len(batch[0]) + (len(free_axes(eqn, 0)) if side == 1 else 0)
    return dict(enumerate(batch[side])) | {start + k: axis for k, axis in enumerate(free_axes(eqn, side))}
