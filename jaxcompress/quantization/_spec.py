"""What a quantized weight looks like: bits, who shares a scale, where zero lies."""

import dataclasses
from typing import Literal, get_args

ScaleDtype = Literal["float32", "bfloat16"]
Convention = Literal["narrow", "full"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Uniform quantization of weights to 1 to 8 bits.

    The weights of one block share a scale. A block is the whole leaf (`per_tensor`), all inputs of one output unit
    (neither `per_tensor` nor `group_size`), or `group_size` consecutive inputs of one output unit. Blocks never cross
    stacked copies (layers, experts).

    Attributes:
        bits: bits per code, in [1, 8]. One bit has its own rule (XNOR-Net): codes {0, 1}, zero point 1/2, scale
            2 mean|w| over the nonzero weights of the block; `symmetric` and `convention` play no role.
        group_size: inputs that share a scale. Groups run along the flattened input axes, the innermost last.
        symmetric: codes are signed and zero is code 0; otherwise unsigned with an integer zero point, and the range of
            a block is widened to contain 0. Either way a weight that is 0 stays exactly 0.
        per_tensor: one scale for the leaf, or for each stacked copy of it.
        scale_dtype: in which scales are stored. The codes are computed with the rounded scale. At groups of 32, float32
            scales cost one bit per weight, bfloat16 half a bit.
        convention: of symmetric codes. "narrow": scale = max|w| / (2^(b-1) - 1), codes in ±(2^(b-1) - 1), so that
            q(-w) = -q(w). "full": scale = max|w| / (2^(b-1) - 1/2), codes in [-2^(b-1), 2^(b-1) - 1], as in GPTQ,
            compressed-tensors and qwix.

    Raises:
        ValueError: an attribute is out of range, or two exclude each other.

    Example:
        >>> QuantSpec(bits=4, group_size=32).code_range
        (-7, 7)
        >>> QuantSpec(bits=9)
        Traceback (most recent call last):
        ValueError: `bits` must be an integer in [1, 8], got 9.

    References:
        Frantar et al., "GPTQ", 2022; Rastegari et al., "XNOR-Net", 2016, section 3.1.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    per_tensor: bool = False
    scale_dtype: ScaleDtype = "float32"
    convention: Convention = "narrow"

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise ValueError(f"`bits` must be an integer in [1, 8], got {self.bits!r}.")
        if self.group_size is not None and (not isinstance(self.group_size, int) or self.group_size < 1):
            raise ValueError(f"`group_size` must be a positive integer or None, got {self.group_size!r}.")
        if self.group_size is not None and self.per_tensor:
            raise ValueError(f"`per_tensor=True` has no groups, got group_size={self.group_size}.")
        if self.scale_dtype not in get_args(ScaleDtype):
            raise ValueError(f"`scale_dtype` must be one of {get_args(ScaleDtype)}, got {self.scale_dtype!r}.")
        if self.convention not in get_args(Convention):
            raise ValueError(f"`convention` must be one of {get_args(Convention)}, got {self.convention!r}.")

    @property
    def signed(self) -> bool:
        """Whether codes are signed (and there is no zero point)."""
        return self.symmetric and self.bits > 1

    @property
    def code_range(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        if not self.signed:
            return 0, 2**self.bits - 1
        highest = 2 ** (self.bits - 1) - 1
        return (-highest if self.convention == "narrow" else -highest - 1), highest
