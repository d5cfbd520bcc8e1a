"""A weight whose matmul inputs are quantized too."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Integer

from jaxcompress._src.arrays.protocol import (
    Multiply,
    StoredArray,
    array_kind,
    call,
    can_unstack,
    cast,
    describe_leaf,
    expanded,
    product,
    reshape,
    slice_axis,
    take_rows,
    transpose,
)
from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.arrays.sharding import component_shardings
from jaxcompress._src.arrays.sparse import SparseArray
from jaxcompress._src.arrays.static_fields import StaticField, exactly
from jaxcompress._src.arrays.straight_through import straight_through
from jaxcompress._src.arrays.validate import is_finite, require, validate_array
from jaxcompress._src.lazy import import_all
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.types import is_compressed, plain

_LARGEST_SUM = 2**31 - 1
"""What int32 holds. Sums on the way there may wrap around, because later ones take that back."""

_Class = TypeVar("_Class", bound=type)


@runtime_checkable
class InputQuantizer(Protocol):
    """How inputs are rounded; hashable, because it is static. `axes` are those that the matmul sums over.

    `scale` and `zero_point` are None (found from `x`), or have one entry or the size of `x` on every axis.
    """

    def codes(self, x: Any, axes: Sequence[int], scale: Any, zero_point: Any) -> QuantizedArray:
        """The codes, one to a byte."""
        ...

    def rounded(self, x: Any, axes: Sequence[int], scale: Any, zero_point: Any) -> jax.Array:
        """The values of the codes, in the dtype of `x`; differentiable."""
        ...


_QUANTIZERS: dict[str, Any] = {}
"""Classes of `InputQuantizer` that files may hold, by name."""

_FIRST = "InputRounding"
"""The class that files need not name: it was the only one when the first of them were written."""


def stored_quantizer(cls: _Class) -> _Class:
    """Class decorator: an `InputQuantizer` with `to_json()` and a static `from_json(content)`, which files may hold.

    `from_json` raises `ValueError` for what `to_json` does not write.
    """
    _QUANTIZERS[cls.__name__] = cls
    return cls


def _encode_inputs(value: Any) -> Any:
    name = type(value).__name__
    if type(value) is not _QUANTIZERS.get(name):
        raise TypeError(f"{value!r} is of type {name}, expected {' or '.join(_QUANTIZERS)}")
    return value.to_json() if name == _FIRST else {"class": name, **value.to_json()}


def _decode_inputs(content: Any) -> Any:
    fields = dict(exactly(dict).decode(content))
    name = fields.pop("class", _FIRST)
    if name not in _QUANTIZERS:
        # The module that defines it may not have been used yet.
        import_all()
    if name not in _QUANTIZERS:
        raise ValueError(f"no class {name!r} rounds inputs; there are {', '.join(_QUANTIZERS)}")
    return _QUANTIZERS[name].from_json(fields)


IntegerProduct = Callable[[jax.Array, jax.Array, Any], jax.Array]
"""`(left, right, dimension numbers) -> int32` product of int8 codes, exact."""

CodedProduct = Callable[[QuantizedArray], jax.Array]
"""Of the quantized input: its product with the weight."""


def _integer_product(left: jax.Array, right: jax.Array, numbers: Any) -> jax.Array:
    return jax.lax.dot_general(left, right, numbers, preferred_element_type=jnp.int32)


@array_kind(inputs=StaticField(_encode_inputs, _decode_inputs))
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class InputQuantizedArray(StoredArray):
    """A weight that says: what I am multiplied with is quantized first.

    It stands for the weight alone; `execute` quantizes the inputs of its matmuls and convolutions. Look-ups have none.

    Invariants: `scale` is None (found anew in every call) or has the sizes of leading, stacked axes of the weight;
    `zero_point`, if there is one, has the shape of `scale`.

    Attributes:
        weight: a plain or compressed array.
        inputs: how inputs are rounded.
        scale: float32, of static ranges, or None.
        zero_point: uint8, or float32 while it is learned, or None.
    """

    weight: Any
    inputs: InputQuantizer
    scale: Any = None
    zero_point: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return tuple(self.weight.shape)

    @property
    def dtype(self) -> Any:
        """Logical dtype."""
        return self.weight.dtype

    changes_inputs: ClassVar[bool] = True

    @on_auto_axes
    def materialize(self) -> jax.Array:
        """The plain weight; nothing is left of the quantization of inputs."""
        return plain(self.weight)

    @on_auto_axes
    def take_rows(self, rows: Integer[Array, "..."]) -> jax.Array:
        """`materialize()[rows]`."""
        return take_rows(self.weight, rows)

    def input_parameters(self, ndim: int, batch: Sequence[int]) -> tuple[Any, Any]:
        """Scale and zero point, shaped to broadcast against an input.

        Args:
            ndim: of the input.
            batch: its axes that run along the weight's stacked axes.
        """
        if self.scale is None:
            return None, None
        if self.scale.ndim not in (0, len(batch)):
            raise ValueError(
                f"Input scales of shape {self.scale.shape} belong to stacked weights, but the matmul has batch axes "
                f"{tuple(batch)} alone."
            )
        shape = [1] * ndim
        for axis, size in zip(batch, self.scale.shape, strict=False):
            shape[axis] = size
        return self.scale.reshape(shape), None if self.zero_point is None else self.zero_point.reshape(shape)

    def expanded(self) -> Any:
        """The same with an expanded weight."""
        return dataclasses.replace(self, weight=expanded(self.weight))

    def with_plain_weight(self) -> Any:
        """The same quantization of inputs for the plain weight; None if it is plain."""
        return dataclasses.replace(self, weight=plain(self.weight)) if is_compressed(self.weight) else None

    def transpose(self, permutation: Sequence[int]) -> Any:
        """The axes in another order; stacked ones stay where they are."""
        stacked = range(self._stacked_ndim)
        fixed = tuple(permutation[: len(stacked)]) == tuple(stacked)
        return self._with_weight(transpose(self.weight, permutation)) if fixed else None

    def reshape(self, shape: Sequence[int]) -> Any:
        """Another shape, with the same stacked axes."""
        fixed = tuple(shape[: self._stacked_ndim]) == self.shape[: self._stacked_ndim]
        return self._with_weight(reshape(self.weight, shape)) if fixed else None

    def slice_axis(self, axis: int, start: Any, size: int) -> Any:
        """Entries along one axis, with their scales if it is stacked."""
        moved = self
        if axis < self._stacked_ndim:
            parts = {"scale": self.scale, "zero_point": self.zero_point}
            cut = {name: part if part is None else slice_axis(part, axis, start, size) for name, part in parts.items()}
            moved = dataclasses.replace(self, **cut)
        return moved._with_weight(slice_axis(self.weight, axis, start, size))

    def cast(self, dtype: Any) -> Any:
        """A weight of another logical dtype."""
        return self._with_weight(cast(self.weight, dtype))

    def can_unstack(self) -> bool:
        """If the weight can, and static ranges are stacked."""
        return can_unstack(self.weight) and (self.scale is None or self.scale.ndim > 0)

    @property
    def _stacked_ndim(self) -> int:
        return 0 if self.scale is None else self.scale.ndim

    def _with_weight(self, weight: Any) -> Any:
        return None if weight is None else dataclasses.replace(self, weight=weight)

    multiplies_parts: ClassVar[bool] = True

    def dot(
        self,
        other: jax.Array,
        side: int,
        parameters: Mapping[str, Any],
        *,
        multiply: Multiply = product,
        integer_product: IntegerProduct | None = _integer_product,
        coded_product: CodedProduct | None = None,
    ) -> jax.Array:
        """The product with the quantized input: in whole numbers where both sides are, otherwise on rounded floats.

        Integer codes on both sides, with one scale along the summed axes, are multiplied as int8 x int8 -> int32, which
        is exact; the result is scaled once. The derivatives are those of the matmul of rounded floats.

        Args:
            other: the input.
            side: of this array.
            parameters: of `lax.dot_general`.
            multiply: what multiplies rounded floats with the weight.
            integer_product: what multiplies the codes; None: nothing, even whole numbers are multiplied as floats.
            coded_product: what multiplies the quantized input with the weight instead of all that.
        """
        rounded: Any = self.inputs.rounded(*self._input_arguments(other, side, parameters))
        weight: Any = self.weight
        operands = (weight, rounded) if side == 0 else (rounded, weight)
        if coded_product is None:
            if integer_product is None or not self.is_whole_product(other, side, parameters):
                return multiply(*operands, parameters)
            coded_product = functools.partial(_whole_dot, weight, side, parameters, integer_product)
        result = product(*operands, parameters)
        # Without differentiation the float matmul has no use, and the compiler drops it.
        coded = coded_product(self.input_codes(other, side, parameters))
        return straight_through(coded.astype(result.dtype), result)

    def input_codes(self, other: Any, side: int, parameters: Mapping[str, Any]) -> QuantizedArray:
        """The quantized input of a product; its arguments are those of `dot`."""
        return self.inputs.codes(*self._input_arguments(other, side, parameters))

    def is_whole_product(self, other: Any, side: int, parameters: Mapping[str, Any]) -> bool:
        """Whether `dot` multiplies whole numbers; `other` may be abstract."""
        contracted, _ = parameters["dimension_numbers"]
        if not _is_whole(self.weight, contracted[side]):
            return False
        codes = jax.eval_shape(lambda other: self.input_codes(other, side, parameters), other)
        return _is_whole(codes, contracted[1 - side]) and _fits(self.weight, codes, contracted[side])

    def _input_arguments(self, other: Any, side: int, parameters: Mapping[str, Any]) -> tuple[Any, ...]:
        contracted, batch = parameters["dimension_numbers"]
        return self._as_float(other), contracted[1 - side], *self.input_parameters(other.ndim, batch[1 - side])

    def _as_float(self, inputs: jax.Array) -> jax.Array:
        """Whole numbers, which `jnp.matmul` leaves as they are, have no steps between them."""
        inputs = jnp.asarray(inputs)
        return inputs if jnp.issubdtype(inputs.dtype, jnp.inexact) else inputs.astype(self.dtype)

    def convolve(self, inputs: jax.Array, parameters: Mapping[str, Any]) -> Any:
        """The convolution of rounded inputs; None where the weight has none of its own."""
        axes = (parameters["dimension_numbers"].lhs_spec[1],)
        rounded = self.inputs.rounded(self._as_float(inputs), axes, *self.input_parameters(inputs.ndim, ()))
        if not is_compressed(self.weight):
            return jax.lax.conv_general_dilated_p.bind(rounded, self.weight, **parameters)
        return call(self.weight, "convolve", rounded, parameters)

    def ragged_dot(self, inputs: jax.Array, sizes: jax.Array, parameters: Mapping[str, Any]) -> Any:
        """The products of rounded inputs; None where the weight is stored, or where each matrix has a static range."""
        if is_compressed(self.weight) or self._stacked_ndim:
            return None
        numbers = parameters["ragged_dot_dimension_numbers"]
        axes = numbers.dot_dimension_numbers[0][0]
        rounded = self.inputs.rounded(self._as_float(inputs), axes, *self.input_parameters(inputs.ndim, ()))
        options = {name: parameters[name] for name in ("precision", "preferred_element_type")}
        return jax.lax.ragged_dot_general(rounded, self.weight, sizes, numbers, **options)

    def shardings(self, sharding: NamedSharding) -> Any:
        """Static ranges along the stacked axes of the weight."""

        def of_leading_axes(part: Any) -> Any:
            spec = PartitionSpec() if part is None else PartitionSpec(*sharding.spec[: part.ndim])
            return None if part is None else NamedSharding(sharding.mesh, spec)

        weight, scale = component_shardings(self.weight, sharding), of_leading_axes(self.scale)
        return dataclasses.replace(self, weight=weight, scale=scale, zero_point=of_leading_axes(self.zero_point))

    def describe(self) -> str:
        """Such as `int8 per-channel, static inputs`."""
        return f"{describe_leaf(self.weight)}, {'dynamic' if self.scale is None else 'static'} inputs"

    def validate(self) -> None:
        """Checks the invariants."""
        if self.scale is not None:
            stacked = self.shape[: self.scale.ndim]
            require(self.scale.shape == stacked, f"Input scales of shape {self.scale.shape}, stacked axes {stacked}.")
            positive = (np.asarray(self.scale) > 0).all()
            require(positive and is_finite(self.scale), "Input scales must be positive and finite.")
        shapes = [None if part is None else part.shape for part in (self.scale, self.zero_point)]
        require(shapes[1] in (None, shapes[0]), f"Input scales and zero points of shapes {shapes} differ.")
        validate_array(self.weight)


def _is_whole(array: Any, axes: Sequence[int]) -> bool:
    """Whether the codes are integers with one scale and one zero point along the summed axes."""
    if not isinstance(array, QuantizedArray) or array.levels is not None:
        return False
    if isinstance(array.data, SparseArray) and array.zero_point is not None:
        return False
    if array.zero_point is not None and jnp.issubdtype(array.zero_point.dtype, jnp.floating):
        return False
    scales = all(count in (1, size) for count, size in zip(array.scale.shape, array.shape, strict=True))
    return scales and all(array.scale.shape[axis] == 1 for axis in axes)


def _fits(weight: QuantizedArray, codes: QuantizedArray, axes: Sequence[int]) -> bool:
    """Whether int32 holds the sum of the largest products, along these axes of the weight."""
    terms = math.prod(weight.shape[axis] for axis in axes)
    return terms * _largest(weight) * _largest(codes) <= _LARGEST_SUM


def _largest(array: QuantizedArray) -> int:
    """The largest magnitude of a code less its zero point."""
    return 2 ** (array.bits - 1) if array.zero_point is None else 255


def _whole_dot(
    weight: QuantizedArray,
    side: int,
    parameters: Mapping[str, Any],
    integer_product: IntegerProduct,
    codes: QuantizedArray,
) -> jax.Array:
    """Σ (a - z)(b - y) = Σ ab - z Σb - y Σa + n z y, times both scales."""
    first, second = (weight, codes) if side == 0 else (codes, weight)
    numbers = parameters["dimension_numbers"]
    (a, z), (b, y) = _centred(first), _centred(second)
    total = integer_product(a, b, numbers)

    def placed(part: jax.Array, side: int) -> jax.Array:
        return _in_output(part, side, numbers, (a.ndim, b.ndim))

    def summed(codes: jax.Array, side: int) -> jax.Array:
        return placed(codes.sum(axis=numbers[0][side], keepdims=True, dtype=jnp.int32), side)

    if z is not None:
        total = total - placed(z, 0) * summed(b, 1)
    if y is not None:
        total = total - placed(y, 1) * summed(a, 0)
    if z is not None and y is not None:
        terms = math.prod(a.shape[axis] for axis in numbers[0][0])
        total = total + terms * placed(z, 0) * placed(y, 1)
    scales = [placed(array.scale.astype(jnp.float32), at) for at, array in enumerate((first, second))]
    return total.astype(jnp.float32) * scales[0] * scales[1]


def _centred(array: QuantizedArray) -> tuple[jax.Array, jax.Array | None]:
    """The codes as int8, and their zero point as int32."""
    codes = array.codes()
    if codes.dtype == jnp.int8:
        return codes, None
    zero_point = array.zero_points()
    assert zero_point is not None  # unsigned codes have one
    # 128 less: u8 x s8 kernels saturate on some processors.
    return (codes ^ jnp.uint8(128)).view(jnp.int8), zero_point.astype(jnp.int32) - 128


def _in_output(part: jax.Array, side: int, numbers: Any, ndims: tuple[int, int]) -> jax.Array:
    """A scale with size 1 on the summed axes, shaped to broadcast against the output: batch, left, right axes."""
    contracted, batch = numbers
    free = [axis for axis in range(ndims[side]) if axis not in contracted[side] and axis not in batch[side]]
    others = (1,) * (ndims[1 - side] - len(contracted[1 - side]) - len(batch[1 - side]))
    part = part.transpose((*batch[side], *free, *contracted[side]))
    leading, trailing = part.shape[: len(batch[side])], part.shape[len(batch[side]) : len(batch[side]) + len(free)]
    return part.reshape(*leading, *trailing, *others) if side == 0 else part.reshape(*leading, *others, *trailing)
