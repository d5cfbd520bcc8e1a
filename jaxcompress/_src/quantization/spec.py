"""What a quantized weight looks like: format, bits, who shares a scale, how ranges are found."""

import dataclasses
import functools
from typing import Any, Literal, get_args

from jaxcompress._src.quantization.formats.fixed_point import FixedPoint
from jaxcompress._src.quantization.formats.integers import Integers
from jaxcompress._src.quantization.formats.means import Ternary
from jaxcompress._src.quantization.formats.number_format import Convention, NumberFormat, ScaleDtype
from jaxcompress._src.quantization.formats.powers_of_two import PowersOfTwo
from jaxcompress._src.quantization.formats.small_floats import FP4_E2M1, FP8_E4M3, FP8_E5M2
from jaxcompress._src.quantization.formats.tables import NF4, Table

RangeRule = Literal["min-max", "percentile", "mse", "entropy"]

_FORMATS: tuple[NumberFormat, ...] = (
    Integers(name="int"),
    Ternary(name="ternary"),
    FixedPoint(name="fixed_point"),
    PowersOfTwo(name="power_of_two"),
    NF4,
    FP4_E2M1,
    FP8_E4M3,
    FP8_E5M2,
    FP4_E2M1.microscaled("mxfp4"),
    FP8_E4M3.microscaled("mxfp8_e4m3"),
    FP8_E5M2.microscaled("mxfp8_e5m2"),
)
FORMATS: dict[str, NumberFormat] = {each.name: each for each in _FORMATS}
"""The formats that have a name; files name those of inputs."""


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
        format: what codes stand for: a row of the table above, or a tuple of any values in ascending order, to whose
            largest magnitude the largest weight of a block is scaled. Formats of another kind are subclasses of
            `NumberFormat` in `jaxcompress._src.quantization.formats`.
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
        >>> QuantSpec(format=(-8.0, -1.0, 0.0, 1.0, 8.0)).bits
        3
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
    format: str | tuple[float, ...] | NumberFormat = "int"
    group_outputs: int = 1
    partial_groups: bool = False
    range_rule: RangeRule = "min-max"
    percentile: float = 99.99
    error_norm: float = 2.0

    def __post_init__(self) -> None:
        if isinstance(self.format, tuple):
            object.__setattr__(self, "format", Table(name="levels", levels=self.format))
        if self.format not in FORMATS and not isinstance(self.format, NumberFormat):
            raise ValueError(
                f"`format` must be one of {tuple(FORMATS)}, a tuple, or a `NumberFormat`, got {self.format!r}."
            )
        for name, literal in _CHOICES.items():
            if getattr(self, name) not in get_args(literal) and (name, self.convention) != ("convention", None):
                raise ValueError(f"`{name}` must be one of {get_args(literal)}, got {getattr(self, name)!r}.")
        self._complete(self._named_format)
        if not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise ValueError(f"`bits` must be an integer in [1, 8], got {self.bits!r}.")
        self._check_blocks()
        self.number_format.check_scale_dtype(self.scale_dtype)
        self._check_range()

    @functools.cached_property
    def number_format(self) -> NumberFormat:
        """What `format` says, with the settings of this spec."""
        assert self.convention is not None  # completed
        return self._named_format.configured(bits=self.bits, symmetric=self.symmetric, convention=self.convention)

    @property
    def signed(self) -> bool:
        """Whether codes are signed (and there is neither a zero point nor a table)."""
        return self.number_format.signed

    @property
    def levels(self) -> tuple[float, ...] | None:
        """What each code stands for before scaling, for formats that are tables; None for integers."""
        return self.number_format.levels

    @property
    def code_range(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        return self.number_format.code_range

    @property
    def _named_format(self) -> NumberFormat:
        return self.format if isinstance(self.format, NumberFormat) else FORMATS[str(self.format)]

    def _complete(self, numbers: NumberFormat) -> None:
        """Sets what the format says and the caller has left out."""
        if not self.bits:
            object.__setattr__(self, "bits", numbers.bits)
        if numbers.is_per_tensor:
            object.__setattr__(self, "per_tensor", True)
        if self.scale_dtype == "float32":
            object.__setattr__(self, "scale_dtype", numbers.scale_dtypes[0])
        if self.group_size is None and not self.per_tensor:
            object.__setattr__(self, "group_size", numbers.default_group_size)
        if self.convention is None:
            few = isinstance(self.bits, int) and 1 < self.bits < 8
            full = few and self.symmetric and numbers.is_integer
            object.__setattr__(self, "convention", "full" if full else "narrow")

    def _check_blocks(self) -> None:
        if self.group_size is not None and (not isinstance(self.group_size, int) or self.group_size < 1):
            raise ValueError(f"`group_size` must be a positive integer or None, got {self.group_size!r}.")
        if self.group_size is not None and self.per_tensor:
            raise ValueError(f"`per_tensor=True` has no groups, got group_size={self.group_size}.")
        if not isinstance(self.group_outputs, int) or self.group_outputs < 1:
            raise ValueError(f"`group_outputs` must be a positive integer, got {self.group_outputs!r}.")
        if self.group_outputs > 1 and self.group_size is None:
            raise ValueError(f"Tiles need a `group_size`, got None with group_outputs={self.group_outputs}.")
        if self.partial_groups and self.group_size is None:
            raise ValueError("`partial_groups` needs a `group_size`, got None.")
        if self.partial_groups and self.range_rule == "percentile":
            raise ValueError("A partial group is filled up with zeros, which moves its percentiles: take another rule.")

    def _check_range(self) -> None:
        if not 0 < self.percentile <= 100:
            raise ValueError(f"`percentile` must be in (0, 100], got {self.percentile}.")
        if not self.error_norm > 0:
            raise ValueError(f"`error_norm` must be positive, got {self.error_norm}.")
        if not self.number_format.uses_range and self.range_rule != "min-max":
            raise ValueError(
                f"Format {self.number_format.name!r} of {self.bits} bits has a scale of its own; `range_rule` "
                f"{self.range_rule!r} has nothing to choose."
            )


_CHOICES: dict[str, Any] = {"scale_dtype": ScaleDtype, "convention": Convention, "range_rule": RangeRule}
