"""Fixed point with b fractional bits, read as two's complement."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.quantization.formats.number_format import NumberFormat, ScaleDtype

Overflow = Literal["wrap", "saturate"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedPoint(NumberFormat):
    """Whole numbers times 2^-bits, in [-1/2, 1/2); saturates."""

    is_per_tensor = True
    uses_range = False
    has_free_scale = False
    has_range_search = False

    def check_scale_dtype(self, scale_dtype: ScaleDtype) -> None:
        """Raises for any but float32."""
        if scale_dtype != "float32":
            raise ValueError(
                "Fixed point has one scale, 2^-bits, in float32: give no `group_size` and no `scale_dtype`."
            )

    def scale_of_weights(self, blocks: Float[Array, "..."], axes: tuple[int, ...], bound: float) -> Float[Array, "..."]:
        """2^-bits, whatever the weights are."""
        del bound
        shape = [1 if axis in axes else size for axis, size in enumerate(blocks.shape)]
        return jnp.full(shape, 2.0**-self.bits, jnp.float32)


@on_auto_axes
def fixed_point_encode(x: Float[Array, "..."], bits: int, *, overflow: Overflow = "wrap") -> UInt8[Array, "..."]:
    """Rounds to multiples of 2^-b and keeps b bits: q = round(x 2^b) mod 2^b, halves to even.

    `fixed_point_decode` undoes it, with an error of at most 2^-(b+1), where round(x 2^b) lies in
    [-2^(b-1), 2^(b-1) - 1]: for x in [-1/2, 1/2 - 2^-(b+1)). The last half step below 1/2 rounds up to 1/2, which is
    out of range.

    Args:
        x: finite; the arithmetic is float32.
        bits: b, in [1, 8].
        overflow: "wrap" takes the remainder as written, so that 1/2 comes back as -1/2; "saturate" first clips to the
            range, so that every x comes back as the nearest value there is.

    Returns:
        q in [0, 2^b).

    Raises:
        ValueError: `bits` or `overflow` is none of these.

    Example:
        >>> x = jnp.array([0.25, -0.25, 0.5])
        >>> fixed_point_encode(x, 4), fixed_point_decode(fixed_point_encode(x, 4), 4)
        (Array([ 4, 12,  8], dtype=uint8), Array([ 0.25, -0.25, -0.5 ], dtype=float32))
        >>> fixed_point_decode(fixed_point_encode(x, 4, overflow="saturate"), 4)
        Array([ 0.25  , -0.25  ,  0.4375], dtype=float32)
    """
    check_bits(bits)
    if overflow not in get_args(Overflow):
        raise ValueError(f"`overflow` must be one of {get_args(Overflow)}, got {overflow!r}.")
    levels = jnp.round(x.astype(jnp.float32) * 2.0**bits)
    if overflow == "saturate":
        levels = jnp.clip(levels, -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)
    return jnp.mod(levels, 2.0**bits).astype(jnp.uint8)


def fixed_point_codes(q: UInt8[Array, "..."], bits: int) -> jax.Array:
    """The two's-complement reading of q: q, or q - 2^b from 2^(b-1) on, as int8."""
    check_bits(bits)
    sign = jnp.uint8(2 ** (bits - 1))
    return ((q ^ sign) - sign).view(jnp.int8)


@on_auto_axes
def fixed_point_decode(q: UInt8[Array, "..."], bits: int) -> Float[Array, "..."]:
    """The numbers that `fixed_point_encode` stands for, in [-1/2, 1/2): codes 2^-b, in float32."""
    return fixed_point_codes(q, bits).astype(jnp.float32) * 2.0**-bits


def check_bits(bits: int) -> None:
    """Raises unless codes of `bits` bits fit into a byte."""
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"`bits` must be an integer in [1, 8], got {bits!r}.")
