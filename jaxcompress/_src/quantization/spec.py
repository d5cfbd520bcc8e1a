"""What a quantized weight looks like: format, bits, who shares a scale, how ranges are found."""

import dataclasses
from typing import Any, Literal, get_args

from jaxcompress._src.quantization.formats import BITS, BLOCK_SCALED, Format, table

ScaleDtype = Literal["float32", "bfloat16", "e8m0"]
Convention = Literal["narrow", "full"]
RangeRule = Literal["min-max", "percentile", "mse", "entropy"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Quantization of weights, or of the inputs that they multiply, to 1 to 8 bits.

    The weights of one block share a scale. A block is the whole leaf (`per_tensor`), all inputs of one output unit
    (neither `per_tensor` nor `group_size`), `group_size` consecutive inputs of one output unit, or such groups of
    `group_outputs` consecutive output units (a tile). Blocks never cross stacked copies (layers, experts).

    | `format` | codes stand for | bits |
    |---|---|---|
    | "int" | whole numbers, less a zero point unless symmetric | given |
    | "ternary" | -1, 0, 1; scale = mean abs(w) above 0.7 of that mean | 2 |
    | "fixed_point" | whole numbers times 2^-bits, in [-1/2, 1/2); no scale to choose; saturates | given |
    | "power_of_two" | 0 and ±2^-k, k < 2^(bits-1) - 1 | given, 2 to 6 |
    | "nf4" | 16 quantiles of a normal distribution | 4 |
    | "fp4_e2m1", "fp8_e4m3", "fp8_e5m2" | small floats; the largest gets the largest number | 4, 8 |
    | "mxfp4", "mxfp8_e4m3", "mxfp8_e5m2" | the same, in groups of 32 by default, with powers of two as scales | 4, 8 |

    Attributes:
        bits: bits per code, in [1, 8]; may be left out where the format says it. One bit has its own rule (XNOR-Net):
            codes {0, 1}, zero point 1/2, scale 2 mean|w| over the nonzero weights of the block; `symmetric` and
            `convention` play no role.
        format: what codes stand for: a row of the table above.
        group_size: inputs that share a scale. Groups run along the flattened input axes, the innermost last.
        group_outputs: output units that share the scale of a group.
        partial_groups: the last group along an axis may be shorter, where `group_size` divides nothing. Otherwise such
            a leaf is an error where it was selected, and left out with a warning where it was not. Not for learned
            steps or rounding, inputs, and the range rule "percentile".
        symmetric: codes are signed and zero is code 0; otherwise unsigned with an integer zero point, and the range of
            a block is widened to contain 0. Either way a weight that is 0 stays exactly 0.
        per_tensor: one scale for the leaf, or for each stacked copy of it.
        scale_dtype: in which scales are stored. The codes are computed with the rounded scale. At groups of 32, float32
            scales cost one bit per weight, bfloat16 half a bit, e8m0 (powers of two) a quarter.
        convention: of symmetric codes. "narrow": scale = max|w| / (2^(b-1) - 1), codes in ±(2^(b-1) - 1), so that
            q(-w) = -q(w). "full": scale = max|w| / (2^(b-1) - 1/2), codes in [-2^(b-1), 2^(b-1) - 1], as in GPTQ,
            compressed-tensors and qwix. By default "full" below 8 bits, where the code that "narrow" leaves out costs
            much (one of four at 2 bits), and "narrow" at 8.
        range_rule: how the range of a block is found. "min-max": its extreme values. "percentile": the `percentile` of
            |w| (symmetric), or that of both signs. "mse": the extreme values times the factor among 1, 0.99, ..., 0.21
            of least error Σ|w - q(w)|^`error_norm`. "entropy": of inputs only, see `input_ranges`.
        percentile: share of |w| within the range, in (0, 100], for `range_rule="percentile"`.
        error_norm: 2 for squares; GPTQ's code uses 2.4.

    Raises:
        ValueError: an attribute is out of range, or two exclude each other.

    Example:
        >>> QuantSpec(bits=4, group_size=32).code_range
        (-8, 7)
        >>> QuantSpec(bits=4, convention="narrow").code_range
        (-7, 7)
        >>> mx = QuantSpec(format="mxfp4")
        >>> mx.bits, mx.group_size, mx.scale_dtype
        (4, 32, 'e8m0')
        >>> QuantSpec(bits=9)
        Traceback (most recent call last):
        ValueError: `bits` must be an integer in [1, 8], got 9.

    References:
        Frantar et al., "GPTQ", 2022; Rastegari et al., "XNOR-Net", 2016, section 3.1; Li et al., "Ternary weight
        networks", 2016 (codes are here the nearest ones, at half the scale, not at 0.7 mean|w|); Zhou et al.,
        "Incremental network quantization", 2017 (powers of two); Dettmers et al., "QLoRA", 2023 (NF4); Micikevicius
        et al., "FP8 formats for deep learning", 2022; "OCP Microscaling formats (MX) specification", 2023.
    """

    bits: int = 0
    group_size: int | None = None
    symmetric: bool = True
    per_tensor: bool = False
    scale_dtype: ScaleDtype = "float32"
    convention: Convention | None = None
    format: Format = "int"
    group_outputs: int = 1
    partial_groups: bool = False
    range_rule: RangeRule = "min-max"
    percentile: float = 99.99
    error_norm: float = 2.0

    def __post_init__(self) -> None:
        for name, literal in _NAMES.items():
            if getattr(self, name) not in get_args(literal) and (name, self.convention) != ("convention", None):
                raise ValueError(f"`{name}` must be one of {get_args(literal)}, got {getattr(self, name)!r}.")
        self._complete()
        _check_bits(self)
        _check_blocks(self)
        _check_range(self)
        if self.format != "int" and (not self.symmetric or self.convention != "narrow"):
            raise ValueError(f"`symmetric` and `convention` are choices of integers; format {self.format!r} has none.")

    def _complete(self) -> None:
        """Sets what the format says and the caller has left out."""
        if not self.bits:
            object.__setattr__(self, "bits", BITS.get(self.format, 0))
        if self.format == "fixed_point":
            object.__setattr__(self, "per_tensor", True)
        if self.format in BLOCK_SCALED:
            if self.scale_dtype == "float32":
                object.__setattr__(self, "scale_dtype", "e8m0")
            if self.group_size is None and not self.per_tensor:
                object.__setattr__(self, "group_size", 32)
        if self.convention is None:
            few = isinstance(self.bits, int) and 1 < self.bits < 8
            full = few and self.symmetric and self.format == "int"
            object.__setattr__(self, "convention", "full" if full else "narrow")

    @property
    def signed(self) -> bool:
        """Whether codes are signed (and there is neither a zero point nor a table)."""
        return self.symmetric and self.bits > 1 and self.levels is None

    @property
    def levels(self) -> tuple[float, ...] | None:
        """What each code stands for before scaling, for formats that are tables; None for integers."""
        return table(self.format, self.bits)

    @property
    def code_range(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        if self.format == "ternary":
            return -1, 1
        if not self.signed:
            return 0, 2**self.bits - 1
        highest = 2 ** (self.bits - 1) - 1
        narrow = self.convention == "narrow" and self.format == "int"
        return (-highest if narrow else -highest - 1), highest


_NAMES: dict[str, Any] = {
    "format": Format,
    "scale_dtype": ScaleDtype,
    "convention": Convention,
    "range_rule": RangeRule,
}


def _check_bits(spec: QuantSpec) -> None:
    if not isinstance(spec.bits, int) or not 1 <= spec.bits <= 8:
        raise ValueError(f"`bits` must be an integer in [1, 8], got {spec.bits!r}.")
    bits = BITS.get(spec.format, spec.bits)
    if spec.bits != bits:
        raise ValueError(f"Codes of format {spec.format!r} have {bits} bits, got `bits` {spec.bits}.")
    if spec.format == "power_of_two" and not 2 <= spec.bits <= 6:
        raise ValueError(f"Powers of two have 2 to 6 bits, got `bits` {spec.bits}.")


def _check_blocks(spec: QuantSpec) -> None:
    if spec.group_size is not None and (not isinstance(spec.group_size, int) or spec.group_size < 1):
        raise ValueError(f"`group_size` must be a positive integer or None, got {spec.group_size!r}.")
    if spec.group_size is not None and spec.per_tensor:
        raise ValueError(f"`per_tensor=True` has no groups, got group_size={spec.group_size}.")
    if not isinstance(spec.group_outputs, int) or spec.group_outputs < 1:
        raise ValueError(f"`group_outputs` must be a positive integer, got {spec.group_outputs!r}.")
    if spec.group_outputs > 1 and spec.group_size is None:
        raise ValueError(f"Tiles need a `group_size`, got None with group_outputs={spec.group_outputs}.")
    if spec.partial_groups and spec.group_size is None:
        raise ValueError("`partial_groups` needs a `group_size`, got None.")
    if spec.partial_groups and spec.range_rule == "percentile":
        raise ValueError("A partial group is filled up with zeros, which moves its percentiles: take another rule.")
    if spec.format in BLOCK_SCALED and spec.scale_dtype != "e8m0":
        raise ValueError(f"Scales of {spec.format!r} are of dtype 'e8m0', got `scale_dtype` {spec.scale_dtype!r}.")
    if spec.format == "fixed_point" and (spec.group_size is not None or spec.scale_dtype != "float32"):
        raise ValueError("Fixed point has one scale, 2^-bits, in float32: give no `group_size` and no `scale_dtype`.")
    if spec.scale_dtype == "e8m0" and (spec.bits == 1 or spec.format == "ternary"):
        raise ValueError("Scales that are means of |w| (one bit, ternary) are no powers of two; got 'e8m0'.")


def _check_range(spec: QuantSpec) -> None:
    if not 0 < spec.percentile <= 100:
        raise ValueError(f"`percentile` must be in (0, 100], got {spec.percentile}.")
    if not spec.error_norm > 0:
        raise ValueError(f"`error_norm` must be positive, got {spec.error_norm}.")
    fixed = spec.bits == 1 or spec.format in ("ternary", "fixed_point")
    if fixed and spec.range_rule != "min-max":
        raise ValueError(
            f"Format {spec.format!r} of {spec.bits} bits has a scale of its own; `range_rule` {spec.range_rule!r} has "
            "nothing to choose."
        )
