"""Quantized leaves as every file format wants them: rows of integers, and scales of groups along the rows.

Shape letters: O outputs (rows), I inputs, G groups of inputs.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from jaxcompress._src.arrays.input_quantized import InputQuantizedArray
from jaxcompress._src.arrays.protocol import describe_leaf
from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.arrays.sparse import SparseArray
from jaxcompress._src.export.info import CannotHoldError


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntegerRows:
    """A matrix `(codes - zero_point) * scale`.

    Attributes:
        codes: (O, I) int16; signed without a `zero_point`, unsigned with one.
        scale: (O, G) float32; every row has its own.
        zero_point: (O, G) float32, or None.
        bits: of the codes.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None
    bits: int

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; all of them where there is one group."""
        return self.codes.shape[1] // max(self.scale.shape[1], 1)

    @property
    def whole_rows(self) -> bool:
        """Whether there is one scale for each row."""
        return self.scale.shape[1] == 1

    def take_rows(self, order: np.ndarray) -> "IntegerRows":
        """The rows in another order."""
        zero_point = None if self.zero_point is None else self.zero_point[order]
        return dataclasses.replace(self, codes=self.codes[order], scale=self.scale[order], zero_point=zero_point)

    def with_groups_of(self, size: int) -> "IntegerRows":
        """The same values in smaller groups, whose scales repeat."""
        times = self.group_size // size

        def repeated(part: np.ndarray | None) -> Any:
            return None if part is None else np.repeat(part, times, axis=1)

        return dataclasses.replace(self, scale=repeated(self.scale), zero_point=repeated(self.zero_point))

    def with_scale(self, scale: np.ndarray) -> "IntegerRows":
        """The same codes with other scales (O, G)."""
        return dataclasses.replace(self, scale=scale.astype(np.float32))

    def values(self) -> np.ndarray:
        """The matrix, (O, I) float32, by the arithmetic of `QuantizedArray`."""
        codes = self.codes.reshape(*self.scale.shape, -1).astype(np.float32)
        zero_point = np.float32(0) if self.zero_point is None else self.zero_point[..., None]
        return ((codes - zero_point) * self.scale[..., None]).reshape(self.codes.shape)

    def unsigned(self, bits: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Codes in [0, 2^bits) and zero points as integers; to symmetric codes 2^(bits - 1) is added, beside None.

        Raises:
            CannotHoldError: zero points are not whole numbers of `bits` bits.
        """
        if self.zero_point is None:
            return (self.codes + 2 ** (bits - 1)).astype(np.uint8), None
        if not (self.zero_point == np.round(self.zero_point)).all():
            raise CannotHoldError("its zero points are not whole numbers, which its format needs")
        low, high = int(self.zero_point.min(initial=0)), int(self.zero_point.max(initial=0))
        if not 0 <= low <= high < 2**bits:
            raise CannotHoldError(f"its zero points are in [{low}, {high}], not in [0, {2**bits - 1}]")
        return self.codes.astype(np.uint8), self.zero_point.astype(np.uint8)


def integer_rows(leaf: Any, *, inputs: int) -> IntegerRows:
    """A quantized matrix as rows of integers.

    Args:
        leaf: compressed, with two axes.
        inputs: the axis that runs along the rows of a file.

    Raises:
        CannotHoldError: it is no matrix of integers with scales.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress.quantization import QuantSpec, quantize
        >>> params = {"kernel": jnp.linspace(-1.0, 1.0, 256).reshape(64, 4)}
        >>> rows = integer_rows(quantize(params, QuantSpec(bits=4, group_size=32))[0]["kernel"], inputs=0)
        >>> rows.codes.shape, rows.scale.shape, rows.group_size
        ((4, 64), (4, 2), 32)
    """
    if isinstance(leaf, InputQuantizedArray):
        raise CannotHoldError("its inputs are quantized too; files hold weights alone")
    if not isinstance(leaf, QuantizedArray):
        raise CannotHoldError(f"it is a {type(leaf).__name__} ({describe_leaf(leaf)}); files hold integers with scales")
    if leaf.levels is not None:
        raise CannotHoldError(f"its codes ({describe_leaf(leaf)}) stand for a table of values; files hold integers")
    if leaf.partial is not None:
        raise CannotHoldError(f"its last group is partial: {leaf.shape[leaf.partial[0]]} inputs in {leaf.partial[1]}s")
    if len(leaf.shape) != 2:
        raise CannotHoldError(f"it has shape {leaf.shape}; files hold matrices")
    if isinstance(leaf.data, SparseArray) and not leaf.plain_zeros():
        raise CannotHoldError("it is sparse and has zero points; files hold dense codes")

    def rows(part: Any) -> np.ndarray:
        part = np.asarray(part)
        return part.T if inputs == 0 else part

    codes, scale = rows(leaf.codes()).astype(np.int16), rows(leaf.scale).astype(np.float32)
    # A scale of several rows (a tile, a tensor) becomes the scale of each of them.
    scale = np.repeat(scale, len(codes) // max(len(scale), 1), axis=0)
    zero_point = leaf.zero_points()
    if zero_point is not None:
        zero_point = rows(zero_point).astype(np.float32)
        zero_point = np.repeat(zero_point, len(codes) // max(len(zero_point), 1), axis=0)
        zero_point = np.ascontiguousarray(np.broadcast_to(zero_point, scale.shape))
    return IntegerRows(codes=codes, scale=scale, zero_point=zero_point, bits=leaf.bits)


def packed_words(codes: np.ndarray, *, bits: int, axis: int) -> np.ndarray:
    """Unsigned codes in int32 words along an axis, as one stream of bits, the lowest first; zeros fill the last word.

    Example:
        >>> packed_words(np.array([[1, 2, 15]], np.uint8), bits=4, axis=1)
        array([[3873]], dtype=int32)
    """
    lines = np.ascontiguousarray(np.moveaxis(codes, axis, -1), np.uint8)
    # Whole words of 32 codes; words that hold no code are cut off.
    count = -(-lines.shape[-1] * bits // 32)
    lines = np.pad(lines, [(0, 0)] * (lines.ndim - 1) + [(0, -lines.shape[-1] % 32)])
    if 8 % bits:
        stream = np.unpackbits(lines[..., None], axis=-1, bitorder="little")[..., :bits]
        stream = np.packbits(stream.reshape(*lines.shape[:-1], -1), axis=-1, bitorder="little")
    else:
        parts = lines.reshape(*lines.shape[:-1], -1, 8 // bits) << np.arange(0, 8, bits, dtype=np.uint8)
        stream = np.bitwise_or.reduce(parts, axis=-1)
    words = stream.view("<i4").astype(np.int32)[..., :count]
    return np.ascontiguousarray(np.moveaxis(words, -1, axis))


def float16_scales(scale: np.ndarray) -> np.ndarray:
    """Scales rounded to float16.

    Raises:
        CannotHoldError: one is too large for float16, or becomes 0.
    """
    with np.errstate(over="ignore"):
        rounded = scale.astype(np.float16)
    if not np.isfinite(rounded).all() or ((rounded == 0) & (scale != 0)).any():
        low, high = np.abs(scale).min(initial=math.inf), np.abs(scale).max(initial=0)
        raise CannotHoldError(f"its scales are in [{low:.3g}, {high:.3g}], which float16 does not hold")
    return rounded
