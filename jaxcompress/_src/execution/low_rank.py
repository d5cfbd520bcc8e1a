"""Low-rank arrays in matmuls and convolutions: two thin ones in place of one."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress._src.arrays.low_rank import LowRankArray
from jaxcompress._src.execution.rearrange import cast
from jaxcompress._src.types import is_compressed

Dot = Callable[[Any, Any, Mapping[str, Any]], jax.Array]
"""`lax.dot_general` of plain or compressed operands: `(left, right, parameters)`."""

_RANK = "rank"


def dot_low_rank(
    leaf: LowRankArray, other: jax.Array, side: int, parameters: Mapping[str, Any], dot: Dot
) -> jax.Array | None:
    """Contracts `other` with the factor that has the contracted axes, then with the other factor; adds the residual.

    Between the two, the product has the dtype of `other`.

    Args:
        leaf: low rank.
        other: the other operand, plain.
        side: 0 if `leaf` is the left operand, else 1.
        parameters: of `lax.dot_general`.
        dot: for the thin products.

    Returns:
        None where neither factor alone has the contracted axes, or where two thin products cannot do what is asked.
    """
    contracted, batch = parameters["dimension_numbers"]
    order = _thin_first(leaf, contracted[side])
    if order is None or not can_stay_thin(leaf, other.dtype, side, parameters):
        return None
    first, second = order
    shared = dict(zip(contracted[1 - side], contracted[side], strict=True))
    shared |= dict(zip(batch[1 - side], batch[side], strict=True))
    names = [shared.get(axis, ("other", axis)) for axis in range(other.ndim)]
    wide = {**parameters, "preferred_element_type": jnp.promote_types(other.dtype, jnp.float32)}
    thin = _contract(_Named(other, names), _named(leaf, first, other.dtype), contracted[side], wide, dot)
    thin = thin._replace(array=thin.array.astype(other.dtype))
    found = _contract(thin, _named(leaf, second, other.dtype, but=_owned(leaf, first)), (_RANK,), parameters, dot)
    free = [
        [axis for axis in range(leaf.ndim) if axis not in (*contracted[side], *batch[side])],
        [("other", axis) for axis in range(other.ndim) if axis not in (*contracted[1 - side], *batch[1 - side])],
    ]
    result = _ordered(found, [*batch[side], *free[side], *free[1 - side]])
    if leaf.residual is None:
        return result
    operands = (leaf.residual, other) if side == 0 else (other, leaf.residual)
    return result + dot(*operands, parameters)


def can_stay_thin(leaf: LowRankArray, dtype: Any, side: int, parameters: Mapping[str, Any]) -> bool:
    """Whether `dot_low_rank` can do without the plain array, with another operand of that dtype."""
    thin = _thin_first(leaf, parameters["dimension_numbers"][0][side]) is not None
    return thin and parameters["out_sharding"] is None and jnp.issubdtype(dtype, jnp.floating)


def convolve_low_rank(leaf: LowRankArray, inputs: jax.Array, eqn: Any) -> jax.Array | None:
    """A convolution to `rank` features, then a matmul of those with the output features; adds the residual's own.

    Args:
        leaf: the kernel.
        inputs: of the convolution.
        eqn: the equation of the convolution.

    Returns:
        None for grouped convolutions, or where neither factor has all axes but that of the output features.
    """
    numbers = eqn.params["dimension_numbers"]
    output = numbers.rhs_spec[0]
    order = _thin_first(leaf, [axis for axis in range(leaf.ndim) if axis != output])
    groups = (eqn.params["feature_group_count"], eqn.params["batch_group_count"])
    if order is None or groups != (1, 1) or order[0].shape[output] != 1:
        return None
    first, second = (_cast(factor, inputs.dtype) for factor in order)
    first, second = (factor.materialize() if is_compressed(factor) else factor for factor in (first, second))
    thin = eqn.primitive.bind(inputs, jnp.moveaxis(jnp.squeeze(first, output), -1, output), **eqn.params)
    features = numbers.out_spec[1]
    result = jnp.tensordot(thin, second.reshape(-1, leaf.rank).astype(thin.dtype), ((features,), (1,)))
    result = jnp.moveaxis(result, -1, features)
    if leaf.residual is None:
        return result
    residual = leaf.residual.materialize() if is_compressed(leaf.residual) else leaf.residual
    return result + eqn.primitive.bind(inputs, residual, **eqn.params)


class _Named(NamedTuple):
    """An array with a name for each axis: the number of an axis of the leaf, `_RANK`, or something of its own."""

    array: Any
    names: Sequence[Hashable]


def _thin_first(leaf: LowRankArray, contracted: Sequence[int]) -> tuple[Any, Any] | None:
    """The factor that alone has all contracted axes, and the other one."""
    for first, second in ((leaf.left, leaf.right), (leaf.right, leaf.left)):
        if all(first.shape[axis] == leaf.shape[axis] and second.shape[axis] == 1 for axis in contracted):
            return first, second
    return None


def _owned(leaf: LowRankArray, factor: Any) -> frozenset[int]:
    return frozenset(axis for axis, size in enumerate(leaf.shape) if factor.shape[axis] == size)


def _named(leaf: LowRankArray, factor: Any, dtype: Any, *, but: frozenset[int] = frozenset()) -> _Named:
    """A factor whose axes are those of the leaf, where it has them; axes of size 1 belong to the first factor."""
    own = [axis for axis in _owned(leaf, factor) if leaf.shape[axis] != 1 or axis not in but]
    names = [axis if axis in own else ("one", axis) for axis in range(leaf.ndim)]
    return _Named(_cast(factor, dtype), [*names, _RANK])


def _cast(factor: Any, dtype: Any) -> Any:
    found = cast(factor, dtype)
    return factor.materialize().astype(dtype) if found is None else found


def _contract(left: _Named, right: _Named, over: Sequence[Hashable], parameters: Mapping[str, Any], dot: Dot) -> _Named:
    """Sums over some names; names that both have otherwise run along."""
    both = [name for name in left.names if name in right.names and name not in over]
    numbers = tuple(
        (tuple(left.names.index(name) for name in names), tuple(right.names.index(name) for name in names))
        for names in (over, both)
    )
    array = dot(left.array, right.array, {**parameters, "dimension_numbers": numbers})
    rest = [name for side in (left, right) for name in side.names if name not in over and name not in both]
    return _Named(array, [*both, *rest])


def _ordered(found: _Named, names: Sequence[Hashable]) -> jax.Array:
    """The axes in the order of `names`, without those that have none (of size 1)."""
    spare = [axis for axis, name in enumerate(found.names) if name not in names]
    kept = [name for name in found.names if name in names]
    return jnp.squeeze(found.array, spare).transpose([kept.index(name) for name in names])
