"""Equations that LiteRT's converter or runtime lacks, or computes otherwise, by operations that both have.

What is left here as it is may still be unknown to them; `litert_program.unsupported_equation` names it then.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from jaxcompress._src.trace.walk import as_body, bind, called_body, walk


class _Rule(NamedTuple):
    """What is written in place of an equation.

    Attributes:
        applies: whether it is, by `(eqn, values)`.
        write: `(eqn, *values) -> output`, or a list of them where the primitive has several.
    """

    applies: Callable[[Any, Sequence[Any]], bool]
    write: Callable[..., Any]


_SMALL = 4096
"""Elements; results of numbers that are known are constants of the file if they have no more."""
_SIGN = np.uint32(1 << 31)
_CASTS = frozenset({"convert_element_type", "bitcast_convert_type"})
_ORDERED = frozenset(
    {"lt", "le", "gt", "ge", "max", "min", "clamp", "sort", "top_k", "argmax", "argmin", "reduce_max", "reduce_min"}
)
"""What the runtime has for numbers alone, not for booleans."""
_BY_VALUE = frozenset(
    {"div", "rem", "sign", "clz", "population_count", "shift_right_logical", "clamp", "top_k", "argmin", "integer_pow"}
)
"""What is something else for the bits of a uint32 as an int32."""


def rewritten(eqn: Any, values: Sequence[Any], *, within: frozenset[str] = frozenset()) -> Sequence[Any]:
    """The outputs of an equation without a body.

    Args:
        eqn: the equation.
        values: of its inputs: tracers, or numbers and arrays that are known.
        within: primitives whose rules are being followed, and stand for themselves there.
    """
    if _is_folded(eqn, values):
        with known(values):
            return bind(eqn, values)
    rule = _rule(eqn, values, within)
    if rule is None:
        return bind(eqn, values)
    specs = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in eqn.invars]
    with eqn.ctx.manager:
        closed = jax.make_jaxpr(functools.partial(rule.write, eqn))(*specs)
    inner = within if rule is _WIDE else within | {eqn.primitive.name}

    def visit(eqn: Any, values: list[Any]) -> Sequence[Any]:
        body = called_body(eqn) if eqn.primitive.name == "jit" else None
        return rewritten(eqn, values, within=inner) if body is None else walk(body, values, visit)

    return walk(as_body(closed), values, visit)


def known(values: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """A context in which JAX computes with known values at once, instead of tracing; no such one if any is traced."""
    return contextlib.nullcontext() if any(map(_is_traced, values)) else jax.ensure_compile_time_eval()


def _is_traced(value: Any) -> bool:
    return isinstance(value, core.Tracer)


def has_keys(eqn: Any) -> bool:
    """Whether a random key is read or made."""
    return any(jnp.issubdtype(var.aval.dtype, jax.dtypes.extended) for var in (*eqn.invars, *eqn.outvars))


def _is_folded(eqn: Any, values: Sequence[Any]) -> bool:
    """Whether an equation is computed while the file is written: of constants, and of random keys above all."""
    if not values or any(map(_is_traced, values)):
        return False
    return has_keys(eqn) or all(var.aval.size <= _SMALL for var in eqn.outvars)


def _rule(eqn: Any, values: Sequence[Any], within: frozenset[str]) -> _Rule | None:
    name = eqn.primitive.name
    if has_keys(eqn):
        return None
    if name not in _CASTS and any((*_wide_inputs(eqn), *_wide_outputs(eqn))):
        return _WIDE
    rules = [] if name in within or name not in _RULES else [_RULES[name]]
    rules += [] if name in _CASTS | _BY_VALUE else [_BY_BITS]
    return next((rule for rule in rules if rule.applies(eqn, values)), None)


def _wide_inputs(eqn: Any) -> list[Any]:
    return [_wide(var.aval.dtype, booleans=eqn.primitive.name in _ORDERED) for var in eqn.invars]


def _wide_outputs(eqn: Any) -> list[Any]:
    return [_wide(var.aval.dtype) for var in eqn.outvars]


def _wide(dtype: Any, *, booleans: bool = False) -> Any:
    """The dtype in which an operation on another is computed, or None where the runtime has it."""
    if dtype == jnp.bool_:
        return jnp.dtype("int32") if booleans else None
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.dtype("int32") if dtype.itemsize < 4 else None
    is_small = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return jnp.dtype("float32") if is_small else None


def _write_wide(eqn: Any, *values: Any) -> Any:
    """In float32 or int32, rounded to the dtype of each output."""
    # What shifts bits in must see those of the code alone: zeros or copies of its sign.
    kind = {"shift_right_logical": "uint", "shift_right_arithmetic": "int"}.get(eqn.primitive.name)
    if kind is not None:
        values = (_bits(values[0], f"{kind}{8 * eqn.invars[0].aval.dtype.itemsize}"), values[1])
    wide = [
        value if dtype is None else jax.lax.convert_element_type(value, dtype)
        for value, dtype in zip(values, _wide_inputs(eqn), strict=True)
    ]
    return _with_dtypes(eqn, _bound(eqn, wide, _wide), jax.lax.convert_element_type)


def _write_by_bits(eqn: Any, *values: Any) -> Any:
    """On the same bits as int32, for which the runtime has more than for uint32."""

    def signed(dtype: Any) -> Any:
        return jnp.dtype("int32") if dtype == jnp.uint32 else None

    values = tuple(_bits(value, jnp.int32) if value.dtype == jnp.uint32 else value for value in values)
    return _with_dtypes(eqn, _bound(eqn, values, signed), _bits)


def _bound(eqn: Any, values: Sequence[Any], other: Callable[[Any], Any]) -> Sequence[Any]:
    """The outputs for values of other dtypes; `other` gives the dtype that stands for one, or None."""
    params = {
        key: (other(value) or value) if key in ("preferred_element_type", "dtype") and value is not None else value
        for key, value in eqn.params.items()
    }
    results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(params))
    return results if eqn.primitive.multiple_results else [results]


def _with_dtypes(eqn: Any, results: Sequence[Any], convert: Callable[[Any, Any], Any]) -> list[Any]:
    dtypes = [var.aval.dtype for var in eqn.outvars]
    return [
        result if result.dtype == dtype else convert(result, dtype)
        for result, dtype in zip(results, dtypes, strict=True)
    ]


def _bits(value: Any, dtype: Any) -> jax.Array:
    return value if value.dtype == dtype else jax.lax.bitcast_convert_type(value, dtype)


def _is_unsigned(eqn: Any, values: Sequence[Any]) -> bool:
    return any(var.aval.dtype == jnp.uint32 for var in (*eqn.invars, *eqn.outvars))


def _is_whole(eqn: Any, values: Sequence[Any]) -> bool:
    return jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.integer)


def _is_boolean(eqn: Any, values: Sequence[Any]) -> bool:
    return eqn.outvars[0].aval.dtype == jnp.bool_


def _is_needed_division(eqn: Any, values: Sequence[Any]) -> bool:
    if eqn.outvars[0].aval.dtype != jnp.int32:
        return False
    return _is_traced(values[1]) or bool(np.isin(np.asarray(values[1]), (0, -1)).any())


def _flipped(x: Any) -> jax.Array:
    """uint32 as int32 in the same order, or the other way round."""
    return _bits(x, jnp.int32) ^ np.int32(-(2**31)) if x.dtype == jnp.uint32 else _bits(x, jnp.uint32) ^ _SIGN


def _ordered(eqn: Any, *values: Any) -> Any:
    """Comparisons, and what takes the largest or the smallest, of uint32."""
    results = _bound(eqn, [_flipped(value) for value in values], lambda dtype: None)
    return [
        result if result.dtype == var.aval.dtype else _flipped(result)
        for result, var in zip(results, eqn.outvars, strict=True)
    ]


def _as_unsigned(rule: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A rule for uint32, for all integers of 32 bits."""

    def write(eqn: Any, *values: Any) -> jax.Array:
        return _bits(rule(*(_bits(value, jnp.uint32) for value in values)), eqn.outvars[0].aval.dtype)

    return write


def _is_outside(amount: jax.Array) -> jax.Array:
    """Where a shift by uint32 leaves nothing."""
    return _flipped(amount) > np.int32(31 - 2**31)


def _shift_left(x: jax.Array, amount: jax.Array) -> jax.Array:
    powers = jnp.asarray(np.array([*(1 << bit for bit in range(32)), 0], np.uint32).view(np.int32))
    place = jnp.where(_is_outside(amount), 32, _bits(amount, jnp.int32))
    return x * _bits(powers.at[place].get(mode="promise_in_bounds"), jnp.uint32)


def _shift_right(x: jax.Array, amount: jax.Array) -> jax.Array:
    is_outside = _is_outside(amount)
    places = _bits(jnp.where(is_outside, 0, _bits(amount, jnp.int32)), jnp.uint32)
    shifted = jax.lax.shift_right_logical(x, jnp.broadcast_to(places, x.shape))
    return _bits(jnp.where(is_outside, 0, _bits(shifted, jnp.int32)), jnp.uint32)


def _shift_right_arithmetic(eqn: Any, x: Any, amount: Any) -> jax.Array:
    places = jnp.where(_is_outside(_bits(amount, jnp.uint32)), 31, _bits(amount, jnp.int32))
    shifted = jax.lax.shift_right_arithmetic(_bits(x, jnp.int32), jnp.broadcast_to(places, x.shape))
    return _bits(shifted, eqn.outvars[0].aval.dtype)


def _and(x: jax.Array, y: jax.Array) -> jax.Array:
    """By halves of 16 bits: 2 (x & y) is x + y less the bits in which they differ, which no carry leaves."""

    def half(x: jax.Array, y: jax.Array) -> jax.Array:
        return _shifted(x + y - (x ^ y), 1)

    upper = np.uint32(1 << 16)
    low = half(_shifted(x * upper, 16), _shifted(y * upper, 16))
    return half(_shifted(x, 16), _shifted(y, 16)) * upper + low


def _or(x: jax.Array, y: jax.Array) -> jax.Array:
    return _and(x, y) + (x ^ y)


def _shifted(x: jax.Array, bits: int) -> jax.Array:
    return jax.lax.shift_right_logical(x, jnp.full(x.shape, bits, jnp.uint32))


def _divided(eqn: Any, x: Any, y: Any) -> jax.Array:
    """As XLA divides integers: by 0 to -1, where the runtime stops; by -1 to the negative, modulo 2^32."""
    plain = jax.lax.div(x, jnp.where((y == 0) | (y == -1), 1, y))
    return jnp.where(y == 0, -1, jnp.where(y == -1, 0 - x, plain))


def _remainder(eqn: Any, x: Any, y: Any) -> jax.Array:
    """Has the sign of `x`: of `rem` the converter makes a remainder that has the sign of `y`."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        magnitude = jax.lax.rem(jnp.abs(x), jnp.abs(y))
        return jnp.where(x < 0, -magnitude, magnitude)
    # Not by magnitudes, of which the least integer has none.
    by = jnp.where((y == 0) | (y == -1), 1, y)
    return jnp.where(y == 0, x, x - by * jax.lax.div(x, by))


def _rounded(eqn: Any, x: Any) -> jax.Array:
    """Halves away from zero; the converter knows halves to even alone."""
    magnitude = jnp.abs(x)
    whole = jnp.floor(magnitude)
    # Not floor(x + 1/2), which rounds up what lies just below a half.
    whole = whole + (magnitude - whole >= 0.5).astype(x.dtype)
    return jnp.where(x < 0, -whole, whole)


def _cube_root(eqn: Any, x: Any) -> jax.Array:
    """The converter makes a power of it, which is NaN for negative numbers."""
    return jnp.sign(x) * eqn.primitive.bind(jnp.abs(x), **eqn.params)


def _is_unsafe_look_up(eqn: Any, values: Sequence[Any]) -> bool:
    if eqn.params["mode"] == jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS:
        return False
    if _is_traced(values[1]):
        return True
    indices = np.asarray(values[1])
    return bool((np.clip(indices, 0, _last_starts(eqn)) != indices).any())


def _last_starts(eqn: Any) -> np.ndarray:
    """The largest indices of a gather that are within its operand."""
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    axes = eqn.params["dimension_numbers"].start_index_map
    return np.array([shape[axis] - sizes[axis] for axis in axes], eqn.invars[1].aval.dtype)


def _looked_up(eqn: Any, table: Any, indices: Any) -> jax.Array:
    """Rows outside are the last ones, or filled, as `mode` has it; the runtime stops at them."""
    within = jnp.clip(indices, 0, np.broadcast_to(_last_starts(eqn), indices.shape))
    modes = jax.lax.GatherScatterMode
    rows = eqn.primitive.bind(table, within, **{**eqn.params, "mode": modes.PROMISE_IN_BOUNDS})
    if eqn.params["mode"] != modes.FILL_OR_DROP:
        return rows
    fill = eqn.params["fill_value"]
    if fill is None and jnp.issubdtype(rows.dtype, jnp.integer):
        limits = jnp.iinfo(rows.dtype)
        fill = limits.min or limits.max
    offset = eqn.params["dimension_numbers"].offset_dims
    batch = [axis for axis in range(rows.ndim) if axis not in offset]
    is_within = jax.lax.broadcast_in_dim((within == indices).all(-1), rows.shape, batch)
    return jnp.where(is_within, rows, jnp.asarray(jnp.nan if fill is None else fill, rows.dtype))


def _sorted(eqn: Any, *values: Any) -> list[jax.Array]:
    """By `top_k` in the reversed order, whose ties keep the lower index first, as a stable sort does."""
    axis = eqn.params["dimension"]
    values = tuple(jnp.moveaxis(value, axis, -1) for value in values)
    keys = _flipped(values[0]) if values[0].dtype == jnp.uint32 else values[0]
    reverse = -keys if jnp.issubdtype(keys.dtype, jnp.floating) else ~keys
    order = jax.lax.top_k(reverse, keys.shape[-1])[1]
    return [jnp.moveaxis(jnp.take_along_axis(value, order, -1, mode="promise_in_bounds"), -1, axis) for value in values]


def _truth(eqn: Any, x: Any) -> jax.Array:
    """Booleans of what the runtime compares."""
    if x.dtype == jnp.uint32:
        return _bits(x, jnp.int32) != 0
    return x.astype(_wide(x.dtype)) != 0


def _is_uncommon_truth(eqn: Any, values: Sequence[Any]) -> bool:
    source = eqn.invars[0].aval.dtype
    return eqn.params["new_dtype"] == jnp.bool_ and (source == jnp.uint32 or _wide(source) is not None)


def _always(eqn: Any, values: Sequence[Any]) -> bool:
    return True


_WIDE = _Rule(_always, _write_wide)
_BY_BITS = _Rule(_is_unsigned, _write_by_bits)
_RULES: Mapping[str, _Rule] = {
    "and": _Rule(_is_whole, _as_unsigned(_and)),
    "cbrt": _Rule(_always, _cube_root),
    "convert_element_type": _Rule(_is_uncommon_truth, _truth),
    "div": _Rule(_is_needed_division, _divided),
    "gather": _Rule(_is_unsafe_look_up, _looked_up),
    "or": _Rule(_is_whole, _as_unsigned(_or)),
    "rem": _Rule(lambda eqn, values: eqn.outvars[0].aval.dtype != jnp.uint32, _remainder),
    "round": _Rule(
        lambda eqn, values: eqn.params["rounding_method"] == jax.lax.RoundingMethod.AWAY_FROM_ZERO, _rounded
    ),
    "shift_left": _Rule(_is_whole, _as_unsigned(_shift_left)),
    "shift_right_arithmetic": _Rule(_is_whole, _shift_right_arithmetic),
    "shift_right_logical": _Rule(_is_whole, _as_unsigned(_shift_right)),
    "sign": _Rule(_is_unsigned, lambda eqn, x: jnp.where(x != 0, jnp.uint32(1), jnp.uint32(0))),
    "sort": _Rule(lambda eqn, values: eqn.params["num_keys"] == 1, _sorted),
    "xor": _Rule(_is_boolean, lambda eqn, x, y: x != y),
    **{
        name: _Rule(_is_unsigned, _ordered)
        for name in ("lt", "le", "gt", "ge", "max", "min", "argmax", "argmin", "reduce_max", "reduce_min")
    },
}
