"""What a number format must say."""

import abc
import dataclasses
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, Num, Shaped

from jaxcompress._src.quantization.arithmetic import divide

ScaleDtype = Literal["float32", "bfloat16", "e8m0"]
Convention = Literal["narrow", "full"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NumberFormat(abc.ABC):
    """What codes stand for, how weights become codes, and how a block of weights gets its scale.

    A code c stands for (c - zero point) * scale, or for levels[c] * scale, which is what `QuantizedArray` stores.
    This base class is that of symmetric whole numbers in `code_range`, whose scale comes from the range of the block.
    Subclasses are frozen dataclasses and hashable, since specs are static arguments of compiled functions. A list of
    values needs no class: it is a `tables.Table`. `QuantSpec` takes the object itself; a row in `spec.FORMATS` gives it
    a name, which recipes and the checkpoints of rounded inputs need.

    Blocks are arrays as `arrays.split_blocks` makes them; scales and zero points broadcast against them.

    Attributes:
        name: in `QuantSpec(format=...)` and in files.
        bits: of a code, in [1, 8]; 0 where a spec gives them. Traced while a schedule changes those of integers.
        levels: what each code stands for before scaling, for tables.
        default_group_size: of specs that give none.
        scale_dtypes: which ones scales may have; the first stands in for "float32".
    """

    name: str
    bits: Any = 0
    levels: tuple[float, ...] | None = None
    default_group_size: int | None = None
    scale_dtypes: tuple[ScaleDtype, ...] = ("float32", "bfloat16", "e8m0")

    is_integer: ClassVar[bool] = False
    """Whether codes are all whole numbers of so many bits, which may be traced."""
    is_per_tensor: ClassVar[bool] = False
    """Whether there is one scale for the whole leaf."""
    uses_range: ClassVar[bool] = True
    """Whether scales come from the range of a block by `scale`, rather than by `scale_of_weights`."""
    has_free_scale: ClassVar[bool] = True
    """Whether scales may be learned or fitted."""
    has_range_search: ClassVar[bool] = True
    """Whether scales of smaller weights may lose less."""
    fixed_zero_point: ClassVar[float | None] = None
    """A zero point that is no choice, beside scales by `scale_of_weights`; those of a range come from `zero_point`."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Checks that the zero point is one that is read."""
        super().__init_subclass__(**options)
        if cls.uses_range and cls.fixed_zero_point is not None:
            raise TypeError(f"{cls.__name__} has a `fixed_zero_point`, which is for formats with `uses_range = False`.")

    def configured(self, *, bits: int, symmetric: bool, convention: Convention) -> "NumberFormat":
        """The format with the settings of a spec.

        Raises:
            ValueError: settings that it does not have.
        """
        configured = self.with_bits(bits)
        if not symmetric or convention != "narrow":
            raise ValueError(f"`symmetric` and `convention` are choices of integers; format {self.name!r} has none.")
        return configured

    def with_bits(self, bits: int) -> "NumberFormat":
        """The format with so many bits; raises `ValueError` if it has others."""
        if self.bits not in (0, bits):
            raise ValueError(f"Codes of format {self.name!r} have {self.bits} bits, got `bits` {bits}.")
        return dataclasses.replace(self, bits=bits)

    def with_traced_bits(self, bits: Any) -> "NumberFormat":
        """Of integers, with bits that are a whole number in [2, 8]; None: the format itself."""
        return self if bits is None else dataclasses.replace(self, bits=bits)

    def check_scale_dtype(self, scale_dtype: ScaleDtype) -> None:
        """Raises `ValueError` unless scales may have this dtype."""
        if scale_dtype not in self.scale_dtypes:
            dtypes = " or ".join(map(repr, self.scale_dtypes))
            raise ValueError(f"Scales of {self.name!r} are of dtype {dtypes}, got `scale_dtype` {scale_dtype!r}.")

    @property
    def signed(self) -> bool:
        """Whether codes are int8; otherwise uint8."""
        return True

    @property
    def code_range(self) -> tuple[Any, Any]:
        """The lowest and the highest code."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    @property
    def has_zero(self) -> bool:
        """Whether a code stands for 0; otherwise weights of 0 are stored as a mask."""
        return True

    @property
    def steps_above_zero(self) -> int:
        """Q_P in LSQ's paper: how many codes stand for positive values; of asymmetric codes, all but one."""
        return max(self.code_range[1], 1)

    @property
    def largest(self) -> float:
        """The magnitude before scaling that the end of a range is given."""
        return self.code_range[1]

    @property
    def range_share(self) -> float:
        """The range over the largest magnitude that a code stands for, at least."""
        return 1.0

    def scale(self, low: Float[Array, "..."], high: Float[Array, "..."]) -> Float[Array, "..."]:
        """The float32 scale of the range [low, high], which contains 0."""
        return divide(jnp.maximum(high, -low), self.largest)

    def power_of_two_scale(self, low: Float[Array, "..."], high: Float[Array, "..."]) -> Float[Array, "..."]:
        """The scale where only powers of two are stored; any other is rounded up to the next one."""
        return self.scale(low, high)

    def zero_point(self, low: Float[Array, "..."], scale: Shaped[Array, "..."]) -> Num[Array, "..."] | None:
        """The zero point of a range under the scale that is stored, or None."""
        del low, scale
        return None

    def scale_of_weights(self, blocks: Float[Array, "..."], axes: tuple[int, ...], bound: float) -> Float[Array, "..."]:
        """The float32 scale of each block, for formats that do not use the range.

        Args:
            blocks: the weights.
            axes: those within a block; they are kept with size 1.
            bound: no finite magnitude may exceed it.
        """
        raise NotImplementedError(f"Format {self.name!r} has scales of ranges.")

    def codes(
        self, blocks: Float[Array, "..."], scale: Shaped[Array, "..."], zero_point: Num[Array, "..."] | None
    ) -> Integer[Array, "..."]:
        """The codes of the nearest values; beyond the ends, of the ends."""
        return self.nearest(divide(blocks, scale), zero_point).astype(jnp.int8 if self.signed else jnp.uint8)

    def nearest(self, scaled: Float[Array, "..."], zero_point: Num[Array, "..."] | None) -> Num[Array, "..."]:
        """The codes of scaled weights, of any dtype; halves to even."""
        codes = jnp.round(scaled)
        return jnp.clip(codes if zero_point is None else codes + zero_point, *self.code_range)

    def is_inside(self, scaled: Float[Array, "..."], zero_point: Num[Array, "..."] | None) -> Bool[Array, "..."]:
        """Which scaled weights lie between the outermost codes."""
        low, high = self.code_range
        place = scaled if zero_point is None else scaled + zero_point
        return (low < place) & (place < high)
