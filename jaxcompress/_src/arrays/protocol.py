"""What a kind of compressed array says of itself, and what stands in where it says nothing.

A kind is one file: a frozen dataclass under `array_kind` that derives from `StoredArray`. It must have `shape`, `dtype`
and `materialize`; every other method of `StoredArray` has a default that is correct, and slower or less telling. This
file is all that running models, checkpoints and reports know of kinds; its functions take plain arrays too, because the
parts of a compressed array may be either.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Integer

from jaxcompress._src.arrays.static_fields import StaticField
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.types import is_compressed, plain

_Class = TypeVar("_Class", bound=type)


class PartCoding(NamedTuple):
    """How a stored part holds small integers, for storage that codes them one by one.

    Attributes:
        bits: of a code.
        shape: of the codes.
        unpack: from the part, as a NumPy array, to the codes as uint8.
        pack: the inverse.
    """

    bits: int
    shape: tuple[int, ...]
    unpack: Callable[[np.ndarray], np.ndarray]
    pack: Callable[[np.ndarray], np.ndarray]


class StoredArray:
    """Base of the kinds: sizes, and what holds of an array of which nothing is known but `materialize`.

    Methods that move an array about return an array of the same kind, or None where only the plain array can be moved:
    whoever asked makes that and says so (`trace.fallbacks`). Axes are those of the logical array and not negative.
    """

    shape: Any
    dtype: Any

    changes_inputs: ClassVar[bool] = False
    """Whether `dot` does more than to multiply, so that the plain array is no substitute in a matmul."""

    multiplies_parts: ClassVar[bool] = False
    """Whether `dot` takes `multiply`, by which it multiplies with its parts."""

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of logical entries."""
        return math.prod(self.shape)

    @property
    def nbits(self) -> int:
        """Stored bits, those of all parts."""
        return sum(8 * leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.nbits // 8

    def materialize(self) -> Any:
        """The plain array, of the logical shape and dtype."""
        raise NotImplementedError(f"{type(self).__name__} must have `materialize`: the one method without a default.")

    def transpose(self, permutation: Sequence[int]) -> Any:
        """The axes in another order, or None."""
        del permutation

    def reshape(self, shape: Sequence[int]) -> Any:
        """Another shape of the same size, or None."""
        del shape

    def slice_axis(self, axis: int, start: Any, size: int) -> Any:
        """`size` entries along one axis from `start`, which may be traced and is not clamped; or None."""
        del axis, start, size

    def cast(self, dtype: Any) -> Any:
        """Another logical dtype, where that loses nothing which the own dtype would have rounded away; or None."""
        del dtype

    def can_unstack(self) -> bool:
        """Whether slicing every part along its first axis slices the array along its first axis, as a scan does."""
        return False

    def take_rows(self, rows: Integer[Array, "..."]) -> Any:
        """The plain `materialize()[rows]`; `rows` index the first axis and are in range. Or None."""
        del rows

    def dot(self, other: jax.Array, side: int, parameters: Mapping[str, Any]) -> Any:
        """The plain product with a plain array, or None. Kinds that `multiplies_parts` take `multiply=`, too.

        Args:
            other: the other operand.
            side: 0 if this array is the left operand, 1 if it is the right one.
            parameters: of `lax.dot_general`, both sides in their order.
        """
        del other, side, parameters

    def convolve(self, inputs: jax.Array, parameters: Mapping[str, Any]) -> Any:
        """The convolution of plain inputs with this array as the kernel, or None.

        Args:
            inputs: the left operand.
            parameters: of `lax.conv_general_dilated`, with resolved dimension numbers.
        """
        del inputs, parameters

    def ragged_dot(self, inputs: jax.Array, sizes: jax.Array, parameters: Mapping[str, Any]) -> Any:
        """The product of each part of the rows with its own matrix of this array, or None.

        Args:
            inputs: the left operand, plain.
            sizes: of the parts.
            parameters: of `lax.ragged_dot_general`, where one matrix meets each part and nothing is batched.
        """
        del inputs, sizes, parameters

    def expanded(self) -> Any:
        """The same values with their zeros stored, plain or as codes; an array that leaves none out, as it is."""
        return self

    def with_plain_weight(self) -> Any:
        """Where an array `changes_inputs`: the same with everything else plain, if anything else is stored; or None."""

    def why_no_share(self) -> str | None:
        """Why what is stored is neither the whole array nor an equal share of it (its parts say so themselves)."""
        return None

    def shardings(self, sharding: NamedSharding) -> Any:
        """The same structure with a `NamedSharding` for each part, see `component_shardings`; by default replicated.

        Raises:
            ValueError: a part cannot be cut as asked; names the axis and sizes.
        """
        return jax.tree.map(lambda _: NamedSharding(sharding.mesh, PartitionSpec()), self)

    def describe(self) -> str:
        """The kind in words, as `report.describe_leaf` gives it."""
        return type(self).__name__

    def validate(self) -> None:
        """Checks the invariants on concrete parts; raises `ValueError`."""

    def validate_shapes(self) -> None:
        """Checks what can be seen of abstract parts, before any is read from a file; raises `ValueError`."""

    def part_coding(self, name: str) -> PartCoding | None:
        """How the part of that name, perhaps abstract, holds small integers; None: as bytes."""
        del name


class ArrayKind(NamedTuple):
    """A class of compressed arrays.

    Attributes:
        cls: the class.
        static: how its static fields are written, by name; all other fields are parts.
        later: static fields that older files do not have, with what stood for them; written where they differ.
    """

    cls: type
    static: Mapping[str, StaticField]
    later: Mapping[str, Any]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the fields that hold arrays."""
        return tuple(field.name for field in dataclasses.fields(self.cls) if field.name not in self.static)


KINDS: dict[str, ArrayKind] = {}
"""By class name, as it stands in files. Classes come from this table alone, never from a file."""


def array_kind(*, later: Mapping[str, Any] | None = None, **static: StaticField) -> Callable[[_Class], _Class]:
    """Class decorator: makes a dataclass a kind that JAX, checkpoints and exported functions know.

    Args:
        later: static fields that older checkpoints do not have, with what stood for them.
        **static: how the static fields are written; all other fields are arrays, compressed arrays or None.

    Raises:
        ValueError: another kind has the same name.
    """

    def register(cls: _Class) -> _Class:
        kind = ArrayKind(cls, static, later or {})
        if cls.__name__ in KINDS:
            raise ValueError(f"There is a kind of the name {cls.__name__!r} already.")
        KINDS[cls.__name__] = kind
        jax.tree_util.register_dataclass(cls, data_fields=list(kind.parts), meta_fields=list(static))
        # `jax.export.export(jax.jit(execute(f)))(compressed, x).serialize()` writes down the trees of its arguments.
        jax.export.register_pytree_node_serialization(
            cls,
            serialized_name=f"jaxcompress.{cls.__name__}",
            serialize_auxdata=functools.partial(_export_static, kind),
            deserialize_auxdata=functools.partial(_import_static, kind),
        )
        return cls

    return register


def _export_static(kind: ArrayKind, values: tuple[Any, ...]) -> bytes:
    """Static fields in the order in which JAX keeps them, which is that of the table."""
    try:
        fields = {name: field.encode(value) for (name, field), value in zip(kind.static.items(), values, strict=True)}
    except TypeError as err:
        raise TypeError(f"a static field of {kind.cls.__name__} cannot be exported: {err}") from err
    return json.dumps(fields).encode()


def _import_static(kind: ArrayKind, content: bytes) -> tuple[Any, ...]:
    fields = json.loads(content)
    return tuple(field.decode(fields[name]) for name, field in kind.static.items())


def call(leaf: Any, method: str, *arguments: Any, **keywords: Any) -> Any:
    """A method of a compressed array; classes that do not derive from `StoredArray` have its defaults, too."""
    return getattr(type(leaf), method, getattr(StoredArray, method))(leaf, *arguments, **keywords)


def why_no_share(leaf: Any) -> str | None:
    """Why a compressed array, or a part of it, is neither whole nor an equal share, in one clause; None if it is.

    `jax.shard_map` hands out what lies on a device, however it was cut.
    """
    if not is_compressed(leaf):
        return None
    parts = (getattr(leaf, field.name) for field in dataclasses.fields(leaf)) if dataclasses.is_dataclass(leaf) else ()
    reasons = (why_no_share(part) for part in parts)
    return call(leaf, "why_no_share") or next((reason for reason in reasons if reason), None)


def changes_inputs(part: Any) -> bool:
    """Whether the plain array is no substitute in a matmul."""
    return is_compressed(part) and getattr(type(part), "changes_inputs", False)


def transpose(part: Any, permutation: Sequence[int]) -> Any:
    """The axes of an array in another order; None where only the plain array can be moved."""
    return call(part, "transpose", permutation) if is_compressed(part) else part.transpose(permutation)


def reshape(part: Any, shape: Sequence[int]) -> Any:
    """An array in another shape; None where only the plain array can be moved."""
    return call(part, "reshape", shape) if is_compressed(part) else part.reshape(shape)


def slice_axis(part: Any, axis: int, start: Any, size: int) -> Any:
    """`size` entries along one axis; None where only the plain array can be cut."""
    if is_compressed(part):
        return call(part, "slice_axis", axis, start, size)
    return jax.lax.dynamic_slice_in_dim(part, start, size, axis)


def cast(part: Any, dtype: Any) -> Any:
    """An array of another float dtype; None where only the plain array can be cast, and for other dtypes."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return call(part, "cast", dtype) if is_compressed(part) else jnp.asarray(part).astype(dtype)


def can_unstack(part: Any) -> bool:
    """Whether slicing every stored part along its first axis slices the array along its first axis."""
    return call(part, "can_unstack") if is_compressed(part) else True


def expanded(part: Any) -> Any:
    """An array with its zeros stored; what is no compressed array, as it is."""
    return call(part, "expanded") if is_compressed(part) else part


def take_rows(part: Any, rows: Integer[Array, "..."]) -> Any:
    """The plain rows of an array."""
    taken = call(part, "take_rows", rows) if is_compressed(part) else None
    return plain(part)[rows] if taken is None else taken


Multiply = Callable[[Any, Any, Mapping[str, Any]], jax.Array]
"""`(left, right, parameters of lax.dot_general) -> product`, of plain or compressed operands."""


def product(left: Any, right: Any, parameters: Mapping[str, Any]) -> jax.Array:
    """`lax.dot_general` of arrays, from what is stored where the kind can do that.

    Of two compressed operands, the one that changes its inputs or else the left one is asked; the other is plain.
    """
    result = None
    if is_compressed(left) or is_compressed(right):
        leaf, other, side = leaf_of_product(left, right)
        result = call(leaf, "dot", plain(other), side, parameters)
    return jax.lax.dot_general_p.bind(plain(left), plain(right), **parameters) if result is None else result


def leaf_of_product(left: Any, right: Any) -> tuple[Any, Any, int]:
    """The compressed operand that is asked for the product, the other one, and the side of the first."""
    changes = [changes_inputs(part) for part in (left, right)]
    side = changes.index(True) if any(changes) else 0 if is_compressed(left) else 1
    return (left, right, 0) if side == 0 else (right, left, 1)


def product_with_plain(plain_leaf: Any, other: jax.Array, side: int, parameters: Mapping[str, Any]) -> jax.Array:
    """`lax.dot_general` of plain operands, of which the first one given stands on the given side."""
    left, right = (plain_leaf, other) if side == 0 else (other, plain_leaf)
    return jax.lax.dot_general_p.bind(left, right, **parameters)


@on_auto_axes
def describe_leaf(leaf: Any) -> str:
    """The kind of a leaf, such as `float32`, `int8`, `int4 g32 2:4`, `bfloat16 bitmask`, `uint4 levels g64`.

    For quantized leaves: the codes, how weights share scales, and how zeros are stored; then, where the inputs are
    quantized too, whether their ranges are dynamic or static. `g32` is a group of 32 weights on one axis, `b16x32` a
    block over several, `per-channel` one scale for all weights along some axes, `per-tensor` one for all of them. For
    low-rank leaves: their factors and the residual, such as `rank 16 float32 + int4 g32`. For codebooks: how many
    values, and how their codes are stored, such as `16 values uint4 bitmask`; for sums of runs, the tables too, such as
    `2 tables of 256x8 uint8`.

    Args:
        leaf: an array, a compressed array, or the abstract form of either.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress._src.arrays.packed import pack
        >>> from jaxcompress.arrays import QuantizedArray
        >>> from jaxcompress.report import describe_leaf
        >>> codes = pack(jnp.ones((64, 8), "int8"), bits=4, axis=0)
        >>> describe_leaf(QuantizedArray(data=codes, scale=jnp.ones((2, 8)), dtype=jnp.dtype("float32")))
        'int4 g32'
    """
    return call(leaf, "describe") if is_compressed(leaf) else str(leaf.dtype)
