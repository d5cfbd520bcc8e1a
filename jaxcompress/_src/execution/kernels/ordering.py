"""Widening a weight just before it is needed, and not before."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def widened_after(leaf: Any, x: jax.Array) -> Any:
    """The same compressed array, whose plain form can't be computed before `x` is.

    XLA on the CPU orders what is independent for concurrency: it widens the weights of all layers first, into buffers
    that are all alive at once. MiniLM at 8 x 64 tokens so takes 46 MB of temporaries instead of 8, and 1.15 of the time
    of the dense model instead of 1.00. A barrier does not help (it is gone before the program is scheduled); data that
    depend on `x` do, and then one buffer serves all layers. On other backends, and on several devices, this is the
    identity.

    Args:
        leaf: a compressed array.
        x: what it is about to be multiplied with.
    """
    parts, structure = jax.tree.flatten(leaf)
    if not x.size or not parts:
        return leaf
    largest = max(range(len(parts)), key=lambda number: parts[number].nbytes)
    zero = known_when_ready(x)
    # The largest part is left alone: it may be the operand of a gather, which would be written out again.
    tied = [
        part if number == largest and len(parts) > 1 else _increased(part, zero) for number, part in enumerate(parts)
    ]
    return structure.unflatten(tied)


def known_when_ready(x: jax.Array) -> jax.Array:
    """float32 0, which XLA on one CPU does not know before `x` is computed.

    Args:
        x: any array.

    Example:
        >>> float(known_when_ready(jnp.ones(3)))
        0.0
    """
    return _zero_p.bind(jax.lax.stop_gradient(x)) if x.size else _constant(x)


def _increased(part: jax.Array, zero: jax.Array) -> jax.Array:
    """`part + zero`, which is `part`."""
    if part.dtype.itemsize > 1 or part.dtype in (jnp.int8, jnp.uint8):
        return part + zero.astype(part.dtype)
    # Floats of 8 bits may have no 0.
    return jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(part, jnp.uint8) + zero.astype(jnp.uint8), part.dtype
    )


_zero_p = Primitive("zero_when_ready")
"""float32 0, known when the operand is. One number for all entries of a batch."""


def _lowered(x: jax.Array) -> jax.Array:
    entry = jax.lax.bitcast_convert_type(x[(0,) * x.ndim].astype(jnp.float32), jnp.int32)
    # Never true, which XLA does not see before it orders the program.
    return ((entry | 1) == 0).astype(jnp.float32)


def _constant(x: jax.Array) -> jax.Array:
    del x
    return jnp.zeros((), jnp.float32)


def _lower_on_cpu(ctx: Any, x: Any) -> Any:
    several = getattr(ctx.module_context.axis_context, "num_devices", 1) != 1
    return mlir.lower_fun(_constant if several else _lowered, multiple_results=False)(ctx, x)


def _batched(operands: Any, axes: Any) -> tuple[jax.Array, Any]:
    del axes
    return _zero_p.bind(*operands), None


def _derivative(primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
    del tangents
    return _zero_p.bind(*primals), jnp.zeros((), jnp.float32)


_zero_p.def_impl(_constant)
_zero_p.def_abstract_eval(lambda x: x.update(shape=(), dtype=jnp.dtype(jnp.float32), weak_type=False))
mlir.register_lowering(_zero_p, mlir.lower_fun(_constant, multiple_results=False))
mlir.register_lowering(_zero_p, _lower_on_cpu, platform="cpu")
batching.primitive_batchers[_zero_p] = _batched
ad.primitive_jvps[_zero_p] = _derivative
