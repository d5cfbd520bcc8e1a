"""What quantized matmuls compute, in plain JAX: the rule of their derivatives, and what kernels are measured against.

Shape letters: M rows, K inputs, N outputs, G groups of inputs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8


def int8_product(x: Float[Array, "M K"], codes: Int8[Array, "K N"], scale: Float[Array, "G N"]) -> Float[Array, "M N"]:
    """`x @ (codes * scale)`, summed in float32.

    Example:
        >>> int8_product(jnp.ones((1, 2)), jnp.array([[1], [3]], "int8"), jnp.array([[0.5]]))
        Array([[2.]], dtype=float32)
    """
    groups = codes.astype(jnp.float32).reshape(len(scale), -1, codes.shape[1]) * scale[:, None].astype(jnp.float32)
    weight = groups.reshape(codes.shape).astype(x.dtype)
    return jnp.dot(x, weight, preferred_element_type=jnp.float32).astype(x.dtype)


def int4_product(
    x: Float[Array, "M K"], packed: UInt8[Array, "P N"], scale: Float[Array, "G N"]
) -> Float[Array, "M N"]:
    """`int8_product` of codes packed along K as `PackedArray` packs them: P = K / 2 bytes, low half first.

    Example:
        >>> int4_product(jnp.ones((1, 2)), jnp.array([[1 + 16 * 3]], "uint8"), jnp.array([[0.5]]))
        Array([[2.]], dtype=float32)
    """
    low, high = (_signed(packed & 15), _signed(packed >> 4))
    return int8_product(x, jnp.stack([low, high], axis=1).reshape(-1, packed.shape[1]), scale)


def w8a8_product(
    x: Int8[Array, "M K"], x_scale: Float[Array, "M 1"], codes: Int8[Array, "K N"], scale: Float[Array, "1 N"]
) -> Float[Array, "M N"]:
    """`(x @ codes) * x_scale * scale` with sums in int32, in the dtype of `x_scale`.

    Example:
        >>> ones = jnp.ones((1, 1))
        >>> w8a8_product(jnp.array([[1, 2]], "int8"), ones, jnp.array([[3], [4]], "int8"), ones)
        Array([[11.]], dtype=float32)
    """
    total = jnp.dot(x, codes, preferred_element_type=jnp.int32).astype(jnp.float32)
    return (total * x_scale.astype(jnp.float32) * scale.astype(jnp.float32)).astype(x_scale.dtype)


def with_plain_derivatives(kernel: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, which has no derivatives, with those of `plain`; both take the same arrays.

    Example:
        >>> cube = with_plain_derivatives(lambda x: x * x * x, lambda x: x**3)
        >>> jax.grad(cube)(2.0)
        Array(12., dtype=float32, weak_type=True)
    """

    @functools.wraps(kernel)
    def call(*arrays: Any) -> Any:
        return kernel(*arrays)

    rule = jax.custom_jvp(call)

    def jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        # The plain product itself has no use then, and the compiler drops it.
        return rule(*primals), jax.jvp(plain, primals, tangents)[1]

    rule.defjvp(jvp)
    return rule


def rows_batched(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel(x, *weight)`, which has no rule for `vmap`, with one: more rows for one weight, else one after another.

    Example:
        >>> double = rows_batched(lambda x, w: x @ w)
        >>> jax.vmap(double, (0, None))(jnp.ones((4, 2, 3)), jnp.ones((3, 5))).shape
        (4, 2, 5)
    """
    call = jax.custom_batching.custom_vmap(kernel)

    def rule(size: int, batched: list[bool], x: Any, *weight: Any) -> tuple[Any, bool]:
        if batched[0] and not any(batched[1:]):
            return call(x.reshape(-1, x.shape[-1]), *weight).reshape(*x.shape[:-1], -1), True
        stacks = [part for part, is_batched in zip((x, *weight), batched, strict=True) if is_batched]

        def one(entries: list[Any]) -> Any:
            rest = iter(entries)
            return call(*(next(rest) if b else part for part, b in zip((x, *weight), batched, strict=True)))

        del size
        return jax.lax.map(one, stacks), True

    call.def_vmap(rule)
    return call


def _signed(halves: UInt8[Array, "..."]) -> Int8[Array, "..."]:
    return ((halves ^ 8) - jnp.uint8(8)).view(jnp.int8)
