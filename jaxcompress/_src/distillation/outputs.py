"""What losses see: outputs by name, masks of positions, sums with counts."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

Outputs: TypeAlias = Mapping[str, Any]
"""What a model returns: arrays by name, such as `logits` and `hidden_states`."""

LossFn: TypeAlias = Callable[[Outputs, Outputs, Mapping[str, Any]], tuple[ArrayLike, ArrayLike]]
"""`(student_outputs, teacher_outputs, batch) -> (sum, count)`, scalars; the loss is their quotient."""


def named(entries: Mapping[str, Any], name: str, owner: str) -> Any:
    """The entry called `name`.

    Args:
        entries: outputs, or a batch.
        name: what to look up.
        owner: whose entries these are, for the message.

    Raises:
        ValueError: no such entry; lists those that exist.

    Example:
        >>> named({"logits": 1}, "hidden_states", "teacher")
        Traceback (most recent call last):
        ValueError: The teacher has no 'hidden_states'; it has: 'logits'.
    """
    if name not in entries:
        found = ", ".join(repr(key) for key in entries) or "nothing"
        raise ValueError(f"The {owner} has no {name!r}; it has: {found}.")
    return entries[name]


def output_pair(student: Outputs, teacher: Outputs, name: str) -> tuple[jax.Array, jax.Array]:
    """The output `name` of both models, of equal shape, in float32 at least.

    Raises:
        ValueError: one of them lacks it, or the shapes differ.
    """
    return same_shape(named(student, name, "student"), named(teacher, name, "teacher"), name)


def same_shape(student: Any, teacher: Any, name: str) -> tuple[jax.Array, jax.Array]:
    """Both arrays in float32 at least; a `ValueError` if their shapes differ."""
    s, t = as_float32(student), as_float32(teacher)
    if s.shape != t.shape:
        raise ValueError(f"{name!r} has shape {s.shape} in the student and {t.shape} in the teacher.")
    return s, t


def as_float32(x: Any) -> jax.Array:
    """`x` in float32, or in its own dtype if that is wider."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def position_mask(batch: Mapping[str, Any], mask: str | None, shape: tuple[int, ...]) -> jax.Array:
    """Which positions count, as bool of `shape`.

    Args:
        batch: has an entry `mask` of that shape: nonzero where the input is real.
        mask: its name. None, or a shape with one axis (examples without positions): all count.
        shape: (batch, positions...).

    Raises:
        ValueError: the batch lacks the mask, or it has another shape.
    """
    if mask is None or len(shape) < 2:
        return jnp.ones(shape, bool)
    if mask not in batch:
        raise ValueError(f"The batch has no mask {mask!r}, only {sorted(batch)}; with nothing padded, say `mask=None`.")
    positions = jnp.asarray(batch[mask])
    if positions.shape != shape:
        raise ValueError(f"The mask {mask!r} has shape {positions.shape}, the positions have {shape}.")
    return positions.astype(bool)


def masked_sum(values: Float[Array, "*n"], mask: Bool[Array, "*n"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`(sum, count)` of the values where the mask is set."""
    return jnp.where(mask, values, 0.0).sum(), mask.sum(dtype=jnp.float32)


def zero_masked(x: Float[Array, "*n c"], mask: Bool[Array, "*n"]) -> Float[Array, "*n c"]:
    """`x` with zeros where the mask is not set.

    Needed before any arithmetic: a NaN at a padded position would reach the gradient through `where` afterwards.
    """
    return jnp.where(mask[..., None], x, 0.0)


def mean(total: Float[Array, ""], count: Float[Array, ""]) -> Float[Array, ""]:
    """The quotient total / count, and 0 with a zero gradient when nothing was counted."""
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), 0.0)
