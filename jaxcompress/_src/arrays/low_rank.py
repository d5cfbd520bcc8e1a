"""Two thin factors in place of an array, and perhaps what they leave over."""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Integer

from jaxcompress._src.arrays.protocol import (
    Multiply,
    StoredArray,
    array_kind,
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
from jaxcompress._src.arrays.reshaping import reshape_runs
from jaxcompress._src.arrays.sharding import component_shardings, spec_entries
from jaxcompress._src.arrays.static_fields import DTYPE
from jaxcompress._src.arrays.validate import require, validate_array
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.types import plain

_RANK = "rank"


@array_kind(dtype=DTYPE)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LowRankArray(StoredArray):
    """A sum of `rank` products of two arrays, each of which varies along some of the axes only.

    Invariant: `original ≈ (left * right).sum(-1) + residual`. Each factor has the logical axes, of full size or of size
    1, and the rank as its last one. An axis that both factors have in full is a stack: one factorization per entry. So
    a kernel of shape (in, out) has `left` (in, 1, rank) and `right` (1, out, rank); under a scan of L layers they are
    (L, in, 1, rank) and (L, 1, out, rank). `residual` has the logical shape and dtype.

    Attributes:
        left: floats, plain or compressed (a `QuantizedArray`, say).
        right: floats, plain or compressed.
        dtype: logical dtype; sums are made in float32 at least.
        residual: None, or an array that is added, plain or compressed.
    """

    left: Any
    right: Any
    dtype: jnp.dtype
    residual: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        sizes = zip(self.left.shape[:-1], self.right.shape[:-1], strict=True)
        return tuple(n if m == 1 else m for n, m in sizes)

    @property
    def rank(self) -> int:
        """Number of products that are added up."""
        return self.left.shape[-1]

    @on_auto_axes
    def materialize(self) -> Float[Array, "..."]:
        """The plain array, of the logical shape and dtype."""
        return _materialize(self)

    @on_auto_axes
    def take_rows(self, rows: Integer[Array, "..."]) -> Float[Array, "..."]:
        """`materialize()[rows]`, multiplying those rows only; `rows` index the first axis and must be in range."""
        length, flat = self.shape[0], rows.reshape(-1)
        parts = [_take(part, flat, length) for part in (self.left, self.right, self.residual)]
        taken = dataclasses.replace(self, left=parts[0], right=parts[1], residual=parts[2])
        dense = jnp.broadcast_to(taken.materialize(), (flat.size, *self.shape[1:]))
        return dense.reshape(*rows.shape, *self.shape[1:])

    def expanded(self) -> Any:
        """The same with expanded factors and residual."""
        parts = {"left": self.left, "right": self.right, "residual": self.residual}
        return dataclasses.replace(self, **{name: expanded(part) for name, part in parts.items()})

    def transpose(self, permutation: Sequence[int]) -> Any:
        """The axes in another order; the rank stays the last."""
        permutation = tuple(permutation)
        return self._moved(
            lambda factor: transpose(factor, (*permutation, self.ndim)),
            lambda residual: transpose(residual, permutation),
        )

    def reshape(self, shape: Sequence[int]) -> Any:
        """Axes may be merged and split as long as one factor, or each of them, has all axes of a run."""
        runs = reshape_runs(self.shape, shape)

        def move(factor: Any) -> Any:
            sizes = [1] * len(shape)
            for before, after in runs:
                size = math.prod(factor.shape[axis] for axis in before)
                if size == math.prod(self.shape[axis] for axis in before):
                    for axis in after:
                        sizes[axis] = shape[axis]
                elif any(factor.shape[axis] != 1 for axis in before):
                    return None
            return reshape(factor, (*sizes, self.rank))

        return self._moved(move, lambda residual: reshape(residual, shape))

    def slice_axis(self, axis: int, start: Any, size: int) -> Any:
        """Entries along one axis."""

        def cut(part: Any) -> Any:
            return part if part.shape[axis] != self.shape[axis] else slice_axis(part, axis, start, size)

        return self._moved(cut, cut)

    def cast(self, dtype: Any) -> Any:
        """Another logical dtype: a narrowing cast of float32 only, elsewhere the plain array is rounded twice."""
        if self.dtype not in (dtype, jnp.float32):
            return None
        moved = self._moved(lambda factor: factor, lambda residual: cast(residual, dtype))
        return None if moved is None else dataclasses.replace(moved, dtype=jnp.dtype(dtype))

    def can_unstack(self) -> bool:
        """If the first axis is a stack of both factors."""
        parts = [part for part in (self.left, self.right, self.residual) if part is not None]
        return all(part.shape[0] == self.shape[0] and can_unstack(part) for part in parts)

    def _moved(self, move: Callable[[Any], Any], move_residual: Callable[[Any], Any]) -> Any:
        """With moved factors and residual; None where one of them cannot be."""
        left, right = move(self.left), move(self.right)
        residual = None if self.residual is None else move_residual(self.residual)
        if left is None or right is None or (residual is None) != (self.residual is None):
            return None
        return dataclasses.replace(self, left=left, right=right, residual=residual)

    multiplies_parts: ClassVar[bool] = True

    def dot(
        self, other: jax.Array, side: int, parameters: Mapping[str, Any], *, multiply: Multiply = product
    ) -> jax.Array | None:
        """Contracts `other` with the factor that has the contracted axes, then with the other one; adds the residual.

        Between the two, the product has the dtype of `other`. None where neither factor alone has the contracted axes,
        or where two thin products cannot do what is asked.
        """
        contracted, batch = parameters["dimension_numbers"]
        order = self._thin_first(contracted[side])
        if order is None or parameters["out_sharding"] is not None or not jnp.issubdtype(other.dtype, jnp.floating):
            return None
        first, second = order
        shared = dict(zip(contracted[1 - side], contracted[side], strict=True))
        shared |= dict(zip(batch[1 - side], batch[side], strict=True))
        names = [shared.get(axis, ("other", axis)) for axis in range(other.ndim)]
        wide = {**parameters, "preferred_element_type": jnp.promote_types(other.dtype, jnp.float32)}
        thin = _contract(_Named(other, names), self._named(first, other.dtype), contracted[side], wide, multiply)
        thin = thin._replace(array=thin.array.astype(other.dtype))
        full = _contract(
            thin, self._named(second, other.dtype, but=self._axes_of(first)), (_RANK,), parameters, multiply
        )
        free = [
            [axis for axis in range(self.ndim) if axis not in (*contracted[side], *batch[side])],
            [("other", axis) for axis in range(other.ndim) if axis not in (*contracted[1 - side], *batch[1 - side])],
        ]
        result = _ordered(full, [*batch[side], *free[side], *free[1 - side]])
        if self.residual is None:
            return result
        operands = (self.residual, other) if side == 0 else (other, self.residual)
        return result + multiply(*operands, parameters)

    def convolve(self, inputs: jax.Array, parameters: Mapping[str, Any]) -> jax.Array | None:
        """A convolution to `rank` features, then a matmul of those with the output features; adds the residual's own.

        None for grouped convolutions, or where neither factor has all axes but that of the output features.
        """
        numbers = parameters["dimension_numbers"]
        output = numbers.rhs_spec[0]
        order = self._thin_first([axis for axis in range(self.ndim) if axis != output])
        groups = (parameters["feature_group_count"], parameters["batch_group_count"])
        if order is None or groups != (1, 1) or order[0].shape[output] != 1:
            return None
        first, second = (plain(_cast(factor, inputs.dtype)) for factor in order)
        kernel = jnp.moveaxis(jnp.squeeze(first, output), -1, output)
        thin = jax.lax.conv_general_dilated_p.bind(inputs, kernel, **parameters)
        features = numbers.out_spec[1]
        result = jnp.tensordot(thin, second.reshape(-1, self.rank).astype(thin.dtype), ((features,), (1,)))
        result = jnp.moveaxis(result, -1, features)
        if self.residual is None:
            return result
        return result + jax.lax.conv_general_dilated_p.bind(inputs, plain(self.residual), **parameters)

    def _thin_first(self, contracted: Sequence[int]) -> tuple[Any, Any] | None:
        """The factor that alone has all contracted axes, and the other one."""
        for first, second in ((self.left, self.right), (self.right, self.left)):
            if all(first.shape[axis] == self.shape[axis] and second.shape[axis] == 1 for axis in contracted):
                return first, second
        return None

    def _axes_of(self, factor: Any) -> frozenset[int]:
        """The axes that a factor has in full."""
        return frozenset(axis for axis, size in enumerate(self.shape) if factor.shape[axis] == size)

    def _named(self, factor: Any, dtype: Any, *, but: frozenset[int] = frozenset()) -> "_Named":
        """A factor whose axes are those of the array, where it has them; axes of size 1 belong to the first factor."""
        axes = [axis for axis in self._axes_of(factor) if self.shape[axis] != 1 or axis not in but]
        names = [axis if axis in axes else ("one", axis) for axis in range(self.ndim)]
        return _Named(_cast(factor, dtype), [*names, _RANK])

    def shardings(self, sharding: NamedSharding) -> Any:
        """Factors along the axes that they have; the rank is whole on every device."""
        entries = spec_entries(sharding, self.ndim)

        def of_factor(factor: Any) -> Any:
            sizes = factor.shape[:-1]
            cut = [None if size == 1 else entry for size, entry in zip(sizes, entries, strict=True)]
            return component_shardings(factor, NamedSharding(sharding.mesh, PartitionSpec(*cut, None)))

        residual = None if self.residual is None else component_shardings(self.residual, sharding)
        return dataclasses.replace(self, left=of_factor(self.left), right=of_factor(self.right), residual=residual)

    def describe(self) -> str:
        """Such as `rank 16 float32 + int4 g32`."""
        kinds = dict.fromkeys(describe_leaf(factor) for factor in (self.left, self.right))
        factors = f"rank {self.rank} {' and '.join(kinds)}"
        return factors if self.residual is None else f"{factors} + {describe_leaf(self.residual)}"

    def validate(self) -> None:
        """Checks the invariants."""
        left, right = tuple(self.left.shape), tuple(self.right.shape)
        fit = (
            len(left) == len(right)
            and left[-1:] == right[-1:]
            and all(n == m or 1 in (n, m) for n, m in zip(left[:-1], right[:-1], strict=True))
        )
        require(fit, f"The factors {left} and {right} need equal ranks, and equal sizes or 1 on all other axes.")
        parts = [part for part in (self.left, self.right, self.residual) if part is not None]
        dtypes = [self.dtype, *(part.dtype for part in parts)]
        require(all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes), f"All dtypes are floats, got {dtypes}.")
        if self.residual is not None:
            shape = tuple(self.residual.shape)
            require(
                shape == self.shape and self.residual.dtype == self.dtype,
                f"The residual is {self.residual.dtype}{shape}, the array {self.dtype}{self.shape}.",
            )
        for part in parts:
            validate_array(part)


class _Named(NamedTuple):
    """An array with a name for each axis: the number of an axis of the leaf, `_RANK`, or something of its own."""

    array: Any
    names: Sequence[Hashable]


def _take(part: Any, rows: Integer[Array, " rows"], length: int) -> Any:
    """Rows of a part that varies along the first axis."""
    return part if part is None or part.shape[0] != length or length == 1 else take_rows(part, rows)


def _cast(factor: Any, dtype: Any) -> Any:
    stored = cast(factor, dtype)
    return factor.materialize().astype(dtype) if stored is None else stored


def _contract(
    left: _Named, right: _Named, over: Sequence[Hashable], parameters: Mapping[str, Any], multiply: Multiply
) -> _Named:
    """Sums over some names; names that both have otherwise run along."""
    both = [name for name in left.names if name in right.names and name not in over]
    numbers = tuple(
        (tuple(left.names.index(name) for name in names), tuple(right.names.index(name) for name in names))
        for names in (over, both)
    )
    array = multiply(left.array, right.array, {**parameters, "dimension_numbers": numbers})
    rest = [name for side in (left, right) for name in side.names if name not in over and name not in both]
    return _Named(array, [*both, *rest])


def _ordered(result: _Named, names: Sequence[Hashable]) -> jax.Array:
    """The axes in the order of `names`, without those that have none (of size 1)."""
    spare = [axis for axis, name in enumerate(result.names) if name not in names]
    rest = [name for name in result.names if name in names]
    return jnp.squeeze(result.array, spare).transpose([rest.index(name) for name in names])


@functools.partial(jax.jit, inline=True)
def _materialize(array: LowRankArray) -> Float[Array, "..."]:
    left, right = plain(array.left), plain(array.right)
    axes = range(array.ndim)
    of_left = [axis for axis in axes if left.shape[axis] == array.shape[axis]]
    of_right = [axis for axis in axes if right.shape[axis] == array.shape[axis]]
    total = jnp.einsum(
        left.reshape(*(left.shape[axis] for axis in of_left), array.rank),
        [*of_left, array.ndim],
        right.reshape(*(right.shape[axis] for axis in of_right), array.rank),
        [*of_right, array.ndim],
        list(axes),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(array.dtype, jnp.float32),
    )
    if array.residual is not None:
        total = total + plain(array.residual).astype(total.dtype)
    return total.astype(array.dtype)
