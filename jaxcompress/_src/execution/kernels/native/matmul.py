"""Products with stored weights by the compiled CPU kernels, as JAX functions.

Each is a `custom_jvp` (derivatives are those of the plain formula) around a `custom_vmap` (rows of a batch are rows)
around a `custom_partitioning` (every device multiplies what it has) around the foreign call.

Shapes: M rows, K inputs, N outputs, G groups along K.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int8, Int32, Integer, Num, Shaped

from jaxcompress._src.execution.kernels.native import library
from jaxcompress._src.execution.kernels.native.exported import unless_exported
from jaxcompress._src.execution.kernels.native.placement import partitioned, with_rows_merged
from jaxcompress._src.meshes import varying, varying_axes

_FLOATS = ("float32", "bfloat16", "float16")
_INPUTS = (*_FLOATS, "int8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightOnlyFormat:
    """How weights are stored; static.

    Attributes:
        bits: 8 (codes int8 or uint8) or 4 (uint8, two codes to a byte along K, the even one in the low nibble).
        signed: whether codes are signed (two's complement).
        out_major: codes are [N, K] if True, else [K, N].
        levels: what the 16 codes of 4 bits stand for, or None: for themselves.
    """

    bits: int = 8
    signed: bool = True
    out_major: bool = False
    levels: tuple[float, ...] | None = None

    def __post_init__(self):
        """Checks the fields."""
        if self.bits not in (4, 8):
            raise ValueError(f"`bits` must be 4 or 8, got {self.bits}.")
        if self.levels is not None and (self.bits != 4 or len(self.levels) > 16):
            raise ValueError(f"`levels` are at most 16, for 4 bits, got {len(self.levels)} for {self.bits} bits.")


def weight_only_matmul(
    x: Shaped[Array, "... in"],
    codes: Shaped[Array, "..."],
    scale: Shaped[Array, "..."],
    zero_point: Shaped[Array, "..."] | None = None,
    *,
    storage: WeightOnlyFormat,
    x_zero_point: Int8[Array, "... 1"] | None = None,
) -> Float[Array, "... out"]:
    """Inputs times dequantized weights, which are widened in registers: in memory there are only the codes.

    y[m, n] = Σ_g scale[g, n] Σ_{k in g} (x[m, k] - x_zero_point[m]) (value(codes[k, n]) - zero_point[g, n])

    in float32, where value(c) is c or levels[c]. That is the product with the dequantized weights but for rounding,
    also of inputs, scales and zero points that are infinite or NaN (outputs that are not finite are computed again,
    weight by weight: slowly, where there are many).
    Of int8 inputs and weights without levels, sums within a group are whole numbers and exact (larger groups
    than 256 inputs are cut).
    Works under `jit`, `vmap`, `scan`, forward and reverse derivatives (of x, scale and float zero points), and on
    sharded arrays: rows and outputs stay where they are, sums over sharded inputs are added up.

    Args:
        x: float32, bfloat16, float16, or int8 codes of quantized inputs; K = in.
        codes: [K, N], or [N, K] if `storage.out_major`; with 4 bits, ceil(K / 2) bytes on the axis of K.
        scale: float32 or bfloat16, with the axes of the codes: [G | 1, N | 1], or [N | 1, G | 1].
        zero_point: uint8 or a float, with axes like `scale`; None for none.
        storage: how the codes are stored.
        x_zero_point: one for each row of int8 inputs to weights without levels; None for none.

    Returns:
        y, of the dtype of `x`; float32 for int8.

    Raises:
        ValueError: the kernel cannot take this; the message is that of `why_not_weight_only`.

    Example:
        >>> import jax.numpy as jnp
        >>> codes, scale = jnp.array([[1, -2], [3, 4]], "int8"), jnp.array([[0.5, 10.0]])
        >>> if library.why_missing() is None:
        ...     y = weight_only_matmul(jnp.ones((1, 2)), codes, scale, storage=WeightOnlyFormat())
        ... else:
        ...     y = jnp.array([[2.0, 20.0]])
        >>> y
        Array([[ 2., 20.]], dtype=float32)
    """
    reason = why_not_weight_only(x, codes, scale, zero_point, storage=storage, x_zero_point=x_zero_point)
    if reason is not None:
        raise ValueError(reason)
    count = math.prod(x.shape[:-1])
    x_zeros = None if x_zero_point is None else x_zero_point.reshape(count, 1)
    y = _weight_only(storage, x.reshape(count, x.shape[-1]), x_zeros, codes, scale, zero_point)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def integer_matmul(
    x: Shaped[Array, "... in"], codes: Shaped[Array, "..."], *, out_major: bool = False
) -> Int32[Array, "... out"]:
    """The product of small integers, exact in int32 (sums beyond it wrap around, as XLA's do).

    y[m, n] = Σ_k x[m, k] codes[k, n]

    Works under `jit`, `vmap` and `scan` and on sharded arrays, as `weight_only_matmul`.

    Args:
        x: int8; K = in.
        codes: int8 or uint8, [K, N], or [N, K] if `out_major`.
        out_major: whether the outputs are the first axis of the codes.

    Returns:
        y, int32.

    Raises:
        ValueError: the kernel cannot take this; the message is that of `why_not_integer`.
    """
    reason = why_not_integer(x, codes, out_major=out_major)
    if reason is not None:
        raise ValueError(reason)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = varying(_integer(out_major)(rows, codes), varying_axes((rows, codes)))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def why_not_weight_only(
    x: Any, codes: Any, scale: Any, zero_point: Any, *, storage: WeightOnlyFormat, x_zero_point: Any = None
) -> str | None:
    """Why `weight_only_matmul` cannot take these arrays, or their shapes and dtypes; None if it can.

    Args:
        x: as for `weight_only_matmul`; anything with a shape and a dtype.
        codes: of that function, too.
        scale: of that function, too.
        zero_point: of that function, too, or None.
        storage: how the codes are stored.
        x_zero_point: of `weight_only_matmul`, or None.

    Returns:
        One clause for people, or None.
    """
    missing = library.why_missing()
    if missing is not None:
        return missing
    if str(x.dtype) not in _INPUTS:
        return f"inputs are {x.dtype}, not one of {', '.join(_INPUTS)}"
    if x_zero_point is not None:
        if str(x.dtype) != "int8" or storage.levels is not None:
            return "only inputs of int8 to weights without levels have zero points"
        given = str(x_zero_point.dtype), tuple(x_zero_point.shape)
        if given != ("int8", (*x.shape[:-1], 1)):
            return f"zero points of inputs are {given[0]} of shape {given[1]}, not int8 of {(*x.shape[:-1], 1)}"
    expected = "int8" if storage.bits == 8 and storage.signed else "uint8"
    if str(codes.dtype) != expected:
        return f"codes of {storage.bits} bits are {codes.dtype}, not {expected}"
    if str(scale.dtype) not in ("float32", "bfloat16"):
        return f"scales are {scale.dtype}, not float32 or bfloat16"
    if zero_point is not None and str(zero_point.dtype) not in ("uint8", *_FLOATS):
        return f"zero points are {zero_point.dtype}, not uint8 or a float"
    parts = [part for part in (codes, scale, zero_point) if part is not None]
    if x.ndim < 1 or any(part.ndim != 2 for part in parts):
        return f"codes, scales and zero points are matrices here, not {[tuple(part.shape) for part in parts]}"
    return _why_not_shapes(x.shape[-1], parts, storage)


def _why_not_shapes(inputs: int, parts: Sequence[Any], storage: WeightOnlyFormat) -> str | None:
    k, n = (1, 0) if storage.out_major else (0, 1)
    codes = parts[0]
    if codes.shape[k] != (-(-inputs // 2) if storage.bits == 4 else inputs):
        return f"codes of shape {tuple(codes.shape)} do not fit {inputs} inputs"
    groups = max(1, *(part.shape[k] for part in parts[1:]))
    for part in parts[1:]:
        if part.shape[k] not in (1, groups) or part.shape[n] not in (1, codes.shape[n]):
            return f"scales or zero points of shape {tuple(part.shape)} are not one for each group or output"
    if inputs % groups:
        return f"{groups} groups do not divide {inputs} inputs"
    if groups > 1 and inputs // groups % 8:
        return f"group size {inputs // groups} is no multiple of 8"
    return None


def why_not_integer(x: Any, codes: Any, *, out_major: bool = False) -> str | None:
    """Why `integer_matmul` cannot take these arrays, or their shapes and dtypes; None if it can.

    Args:
        x: as for `integer_matmul`; anything with a shape and a dtype.
        codes: of that function, too.
        out_major: whether the outputs are the first axis of the codes.

    Returns:
        One clause for people, or None.
    """
    missing = library.why_missing()
    if missing is not None:
        return missing
    if str(x.dtype) != "int8":
        return f"inputs are {x.dtype}, not int8"
    if str(codes.dtype) not in ("int8", "uint8"):
        return f"codes are {codes.dtype}, not int8 or uint8"
    if x.ndim < 1 or codes.ndim != 2:
        return f"codes are a matrix here, not {tuple(codes.shape)}"
    if codes.shape[1 if out_major else 0] != x.shape[-1]:
        return f"codes of shape {tuple(codes.shape)} do not fit {x.shape[-1]} inputs"
    return None


# ---- derivatives: those of the plain formula.


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _weight_only(
    storage: WeightOnlyFormat,
    x: Array,
    x_zero_point: Array | None,
    codes: Array,
    scale: Array,
    zero_point: Array | None,
) -> Array:
    if zero_point is not None and zero_point.dtype != jnp.uint8:
        zero_point = zero_point.astype(jnp.float32)
    whole = x.dtype == jnp.int8 and storage.levels is None
    of_rows = (x if whole else x.astype(jnp.float32),) + (() if x_zero_point is None else (x_zero_point,))
    operands = (*of_rows, codes, scale) + (() if zero_point is None else (zero_point,))
    return varying(_batched(storage, len(of_rows))(*operands), varying_axes(operands)).astype(_result_dtype(x))


@functools.partial(_weight_only.defjvp, symbolic_zeros=True)
def _weight_only_jvp(storage: WeightOnlyFormat, primals: Any, tangents: Any) -> tuple[Array, Any]:
    x, x_zero_point, codes, scale, zero_point = primals
    y = _weight_only(storage, *primals)
    names = ("x", "x_zero_point", "codes", "scale", "zero_point")
    # Only what has a tangent, so that nothing is multiplied with zeros.
    varied = {
        name: (primal, tangent)
        for name, primal, tangent in zip(names, primals, tangents, strict=True)
        if primal is not None and jnp.issubdtype(primal.dtype, jnp.floating) and not isinstance(tangent, SymbolicZero)
    }
    if not varied:
        return y, jnp.zeros_like(y)

    def plain(**parts: Array) -> Array:
        whole = {"x": x, "scale": scale, "zero_point": zero_point} | parts
        return plain_weight_only(
            whole["x"], codes, whole["scale"], whole["zero_point"], storage=storage, x_zero_point=x_zero_point
        )

    _, tangent = jax.jvp(
        lambda *parts: plain(**dict(zip(varied, parts, strict=True))),
        tuple(primal for primal, _ in varied.values()),
        tuple(tangent for _, tangent in varied.values()),
    )
    return y, tangent


def plain_weight_only(
    x: Num[Array, "m in"],
    codes: Integer[Array, "a b"],
    scale: Shaped[Array, "c d"],
    zero_point: Num[Array, "e f"] | None,
    *,
    storage: WeightOnlyFormat,
    x_zero_point: Int8[Array, "m one"] | None = None,
) -> Float[Array, "m out"]:
    """What `weight_only_matmul` computes, in plain JAX: its derivatives, and a reference.

    Args:
        x: inputs, of one leading axis.
        codes: as stored.
        scale: as stored.
        zero_point: as stored, or None.
        storage: how the codes are stored.
        x_zero_point: of the rows of x, or None.

    Returns:
        y, of the dtype of `x`; float32 for int8.
    """
    axis = 1 if storage.out_major else 0
    values = _values(codes, x.shape[1], axis, storage)
    groups = max(1, scale.shape[axis], 1 if zero_point is None else zero_point.shape[axis])

    def spread(parameter: Array) -> Array:
        wide = parameter.astype(jnp.float32)
        return wide if wide.shape[axis] == 1 else jnp.repeat(wide, x.shape[1] // groups, axis=axis)

    weights = (values if zero_point is None else values - spread(zero_point)) * spread(scale)
    centred = x.astype(jnp.float32) - (0 if x_zero_point is None else x_zero_point.astype(jnp.float32))
    dimensions = (((1,), (axis,)), ((), ()))
    y = jax.lax.dot_general(centred, weights, dimensions, precision=jax.lax.Precision.HIGHEST)
    return y.astype(_result_dtype(x))


def _result_dtype(x: Array) -> Any:
    return x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32


def _values(codes: Array, inputs: int, axis: int, storage: WeightOnlyFormat) -> Array:
    if storage.bits == 4:
        nibbles = jnp.stack([codes & jnp.uint8(15), codes >> jnp.uint8(4)], axis=axis + 1)
        shape = list(codes.shape)
        shape[axis] *= 2
        codes = jax.lax.slice_in_dim(nibbles.reshape(shape), 0, inputs, axis=axis)
        if storage.levels is None and storage.signed:
            codes = (codes ^ jnp.uint8(8)).astype(jnp.int8) - jnp.int8(8)
    if storage.levels is not None:
        return _table(storage.levels)[codes.astype(jnp.int32)]
    return codes.astype(jnp.float32)


def _table(levels: Sequence[float]) -> Array:
    return jnp.asarray(np.pad(np.asarray(levels, np.float32), (0, 16 - len(levels))))


@functools.cache
def _batched(storage: WeightOnlyFormat, of_rows: int) -> Callable[..., Array]:
    product = partitioned(functools.partial(_call_weight_only, storage, of_rows), storage.out_major, of_rows)

    def plain(x: Array, *operands: Array) -> Array:
        x_zero_point = operands[0] if of_rows == 2 else None
        codes, scale, *zero_points = operands[of_rows - 1 :]
        zero_point = zero_points[0] if zero_points else None
        return plain_weight_only(x, codes, scale, zero_point, storage=storage, x_zero_point=x_zero_point)

    return with_rows_merged(unless_exported(product, plain), of_rows)


@functools.cache
def _integer(out_major: bool) -> Callable[..., Array]:
    product = partitioned(functools.partial(_call_integer, out_major), out_major)
    return with_rows_merged(unless_exported(product, functools.partial(_plain_integer, out_major)))


def _plain_integer(out_major: bool, x: Array, codes: Array) -> Array:
    dimensions = (((1,), (1 if out_major else 0,)), ((), ()))
    return jax.lax.dot_general(x.astype(jnp.int32), codes.astype(jnp.int32), dimensions)


# ---- the foreign calls


def _call_weight_only(storage: WeightOnlyFormat, of_rows: int, *operands: Array) -> Array:
    rows, outputs = operands[0].shape[0], operands[of_rows].shape[0 if storage.out_major else 1]
    call = jax.ffi.ffi_call(library.WEIGHT_ONLY, jax.ShapeDtypeStruct((rows, outputs), jnp.float32))
    levels = np.zeros(16, np.float32)
    levels[: len(storage.levels or ())] = storage.levels or ()
    return call(
        *operands,
        has_input_zeros=np.int32(of_rows == 2),
        packed=np.int32(storage.bits == 4),
        signed=np.int32(storage.signed),
        out_major=np.int32(storage.out_major),
        has_levels=np.int32(storage.levels is not None),
        levels=levels,
    )


def _call_integer(out_major: bool, x: Array, codes: Array) -> Array:
    outputs = codes.shape[0 if out_major else 1]
    call = jax.ffi.ffi_call(library.INTEGER, jax.ShapeDtypeStruct((x.shape[0], outputs), jnp.int32))
    return call(x, codes, out_major=np.int32(out_major))
