"""Quantized matmuls for TPUs, in Pallas.

Unmeasured: they have run in Pallas' interpreter and been lowered for TPUs, but never run on one. XLA fuses the widening
of int8 into its own matmuls; until `examples/benchmarks/device.py` shows that a kernel beats that, nothing uses them
unless asked by name.

All take weights as (inputs, outputs), add in float32 (int32), and have the derivatives of the plain products. Blocks of
the weight are widened in VMEM, so that HBM is read for the codes alone. Rows are padded to whole blocks.

Shape letters: M rows, K inputs, N outputs, G groups of inputs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int8, UInt8

from jaxcompress._src.execution.kernels.plain import (
    int4_product,
    int8_product,
    w8a8_product,
    with_plain_derivatives,
)

# Largest blocks first: fewer visits of each block of x and of the sums. All fit into 16 MiB of VMEM twice over.
_ROWS = 256
_INPUTS = (1024, 512, 256)
_OUTPUTS = (512, 256, 128)
# Rows of a tile of int8: what all narrower tiles divide.
_TILE = 32


def int8_matmul(
    x: Float[Array, "M K"], codes: Int8[Array, "K N"], scale: Float[Array, "G N"], *, interpret: bool = False
) -> Float[Array, "M N"]:
    """`x @ (codes * scale)`. Unmeasured on a device.

    One scale for each output is multiplied with the sums; those of groups with the codes, which are then rounded to the
    dtype of `x`, as `materialize` rounds them.

    Args:
        x: float32 or bfloat16.
        codes: of the weight.
        scale: one for each output (G = 1), or for K / G inputs.
        interpret: run by Pallas' interpreter, on any backend.

    Raises:
        ValueError: shapes or dtypes that `why_not_int8` names.

    Example:
        >>> x, codes, scale = jnp.ones((3, 256)), jnp.ones((256, 128), jnp.int8), jnp.full((1, 128), 0.5)
        >>> int8_matmul(x, codes, scale, interpret=True)[0, :2]
        Array([128., 128.], dtype=float32)
    """
    _require(why_not_int8(x, codes, scale))
    return _differentiable("int8", interpret)(x, codes, scale)


def int4_matmul(
    x: Float[Array, "M K"], packed: UInt8[Array, "P N"], scale: Float[Array, "G N"], *, interpret: bool = False
) -> Float[Array, "M N"]:
    """`int8_matmul` for codes that a `PackedArray` packs along K. Unmeasured on a device.

    A byte holds the codes of two neighbouring inputs, so the halves are multiplied with the even and the odd inputs,
    and nothing is interleaved in the kernel.

    Args:
        x: float32 or bfloat16.
        packed: K / 2 bytes for each output, low half first.
        scale: one for each output (G = 1), or for K / G inputs.
        interpret: run by Pallas' interpreter, on any backend.

    Raises:
        ValueError: shapes or dtypes that `why_not_int4` names.

    Example:
        >>> x, packed, scale = jnp.ones((3, 256)), jnp.full((128, 128), 0x21, jnp.uint8), jnp.full((1, 128), 0.5)
        >>> int4_matmul(x, packed, scale, interpret=True)[0, :2]
        Array([192., 192.], dtype=float32)
    """
    _require(why_not_int4(x, packed, scale))
    return _differentiable("int4", interpret)(x, packed, scale)


def w8a8_matmul(
    x: Int8[Array, "M K"],
    x_scale: Float[Array, "M 1"],
    codes: Int8[Array, "K N"],
    scale: Float[Array, "1 N"],
    *,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """`(x @ codes) * x_scale * scale`, summed in int32. Unmeasured on a device.

    Args:
        x: codes of the inputs.
        x_scale: one for each row; its dtype is that of the result.
        codes: of the weight.
        scale: one for each output.
        interpret: run by Pallas' interpreter, on any backend.

    Raises:
        ValueError: shapes or dtypes that `why_not_w8a8` names.

    Example:
        >>> x, codes = jnp.ones((3, 256), jnp.int8), jnp.ones((256, 128), jnp.int8)
        >>> w8a8_matmul(x, jnp.ones((3, 1)), codes, jnp.full((1, 128), 0.5), interpret=True)[0, :2]
        Array([128., 128.], dtype=float32)
    """
    _require(why_not_w8a8(x, x_scale, codes, scale))
    return _differentiable("w8a8", interpret)(x, x_scale, codes, scale)


def why_not_int8(x: Any, codes: Any, scale: Any) -> str | None:
    """Why `int8_matmul` does not take these, arrays or abstract ones; None: it does.

    Example:
        >>> why_not_int8(jnp.ones((3, 100)), jnp.ones((100, 128), jnp.int8), jnp.ones((1, 128)))
        'K must be a multiple of 256, got 100'
    """
    return _why_not_weight(codes, jnp.int8) or _why_not(x, codes.shape[0], codes.shape[1], scale)


def why_not_int4(x: Any, packed: Any, scale: Any) -> str | None:
    """Why `int4_matmul` does not take these, arrays or abstract ones; None: it does.

    Example:
        >>> why_not_int4(jnp.ones((3, 256)), jnp.ones((128, 128), jnp.uint8), jnp.ones((16, 128)))
        'groups must be multiples of 32, got 16'
    """
    return _why_not_weight(packed, jnp.uint8) or _why_not(x, 2 * packed.shape[0], packed.shape[1], scale)


def why_not_w8a8(x: Any, x_scale: Any, codes: Any, scale: Any) -> str | None:
    """Why `w8a8_matmul` does not take these, arrays or abstract ones; None: it does.

    Example:
        >>> x, codes, one = jnp.ones((3, 256)), jnp.ones((256, 128), jnp.int8), jnp.ones((1, 1))
        >>> why_not_w8a8(x, one, codes, one)
        'codes of inputs must be int8, got float32'
    """
    if x.dtype != jnp.int8:
        return f"codes of inputs must be int8, got {x.dtype}"
    if x.ndim != 2 or tuple(x_scale.shape) != (x.shape[0], 1) or scale.shape[0] != 1:
        return f"scales must be of rows and of outputs, got {x_scale.shape} and {scale.shape} for inputs {x.shape}"
    values = jax.ShapeDtypeStruct(x.shape, x_scale.dtype)
    return _why_not_weight(codes, jnp.int8) or _why_not(values, codes.shape[0], codes.shape[1], scale)


def _require(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(f"No TPU kernel for this matmul: {reason}.")


def _why_not_weight(codes: Any, dtype: Any) -> str | None:
    if codes.ndim != 2 or codes.dtype != dtype:
        return f"codes must be two-dimensional {jnp.dtype(dtype).name}, got {codes.dtype} of shape {codes.shape}"
    return None


def _why_not(x: Any, inputs: int, outputs: int, scale: Any) -> str | None:
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"x must be float32 or bfloat16, got {x.dtype}"
    if x.ndim != 2 or x.shape[1] != inputs:
        return f"x must be (rows, {inputs}), got {x.shape}"
    if inputs % _INPUTS[-1] or not inputs:
        return f"K must be a multiple of {_INPUTS[-1]}, got {inputs}"
    if outputs % _OUTPUTS[-1] or not outputs:
        return f"N must be a multiple of {_OUTPUTS[-1]}, got {outputs}"
    if scale.ndim != 2 or scale.shape[1] != outputs or not scale.shape[0] or inputs % scale.shape[0]:
        return f"scales must be (groups of K, {outputs}), got {scale.shape}"
    size = inputs // scale.shape[0]
    if size % _TILE:
        return f"groups must be multiples of {_TILE}, got {size}"
    if scale.shape[0] > 1 and _input_block(inputs, size) is None:
        return f"groups must divide, or be divided by, a block of {_INPUTS} inputs, got {size}"
    return None


def _input_block(inputs: int, size: int) -> int | None:
    """The largest block of inputs that holds whole groups, or is within one."""
    blocks = [block for block in _INPUTS if inputs % block == 0 and (block % size == 0 or size % block == 0)]
    return blocks[0] if blocks else None


@functools.cache
def _differentiable(kind: str, interpret: bool) -> Any:
    kernel, plain = {
        "int8": (_int8, int8_product),
        "int4": (_int4, int4_product),
        "w8a8": (_w8a8, w8a8_product),
    }[kind]
    return with_plain_derivatives(functools.partial(kernel, interpret=interpret), plain)


def _int8(x: jax.Array, codes: jax.Array, scale: jax.Array, *, interpret: bool) -> jax.Array:
    return _call(_float_kernel, [x], codes, scale, x.dtype, x.shape[1], interpret=interpret)


def _int4(x: jax.Array, packed: jax.Array, scale: jax.Array, *, interpret: bool) -> jax.Array:
    halves = [x[:, 0::2], x[:, 1::2]]
    return _call(_float_kernel, halves, packed, scale, x.dtype, x.shape[1], interpret=interpret)


def _w8a8(x: jax.Array, x_scale: jax.Array, codes: jax.Array, scale: jax.Array, *, interpret: bool) -> jax.Array:
    return _call(_whole_kernel, [x], codes, scale, x_scale.dtype, x.shape[1], row_scale=x_scale, interpret=interpret)


def _call(
    kernel: Any,
    xs: list[jax.Array],
    codes: jax.Array,
    scale: jax.Array,
    dtype: Any,
    inputs: int,
    *,
    row_scale: jax.Array | None = None,
    interpret: bool,
) -> jax.Array:
    """One block of sums for each block of rows and outputs, over the blocks of inputs."""
    rows, outputs, groups = xs[0].shape[0], codes.shape[1], scale.shape[0]
    size = inputs // groups
    bk = _input_block(inputs, size) if groups > 1 else _input_block(inputs, inputs)
    assert bk is not None  # the predicates see to it
    bm = min(_ROWS, -(-rows // _TILE) * _TILE)
    bn = next(block for block in _OUTPUTS if outputs % block == 0)
    padding = -rows % bm
    xs = [jnp.pad(x, ((0, padding), (0, 0))) for x in xs]
    # Scales of the groups of a block, (1, groups, bn): the last two axes of a block are whole, or whole tiles.
    per_block = max(bk // size, 1)
    blocks_per_group = max(size // bk, 1)
    steps = scale.astype(jnp.float32).reshape(-1, per_block, outputs)
    in_specs = [pl.BlockSpec((bm, bk * x.shape[1] // inputs), lambda i, j, k: (i, k)) for x in xs]
    in_specs.append(pl.BlockSpec((bk * codes.shape[0] // inputs, bn), lambda i, j, k: (k, j)))
    # `//` rounds down, for which the lowering asks which TPU there is.
    in_specs.append(pl.BlockSpec((1, per_block, bn), lambda i, j, k: (jax.lax.div(k, blocks_per_group), 0, j)))
    operands = [*xs, codes, steps]
    if row_scale is not None:
        in_specs.append(pl.BlockSpec((bm, 1), lambda i, j, k: (i, 0)))
        operands.append(jnp.pad(row_scale.astype(jnp.float32), ((0, padding), (0, 0))))
    total = jnp.int32 if row_scale is not None else jnp.float32
    result = pl.pallas_call(
        functools.partial(kernel, grouped=groups > 1),
        grid=((rows + padding) // bm, outputs // bn, inputs // bk),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((bm, bn), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows + padding, outputs), dtype),
        scratch_shapes=[pltpu.VMEM((bm, bn), total)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(*operands)
    return result[:rows]


def _float_kernel(*refs: Any, grouped: bool) -> None:
    *x_refs, codes_ref, scale_ref, out_ref, sums_ref = refs
    _clear_first(sums_ref)
    for x_ref, codes in zip(x_refs, _halves(codes_ref[...], len(x_refs)), strict=True):
        weight = codes.astype(jnp.float32)
        if grouped:
            groups = weight.reshape(scale_ref.shape[1], -1, weight.shape[1]) * scale_ref[0][:, None]
            weight = groups.reshape(weight.shape)
        product = jnp.dot(x_ref[...], weight.astype(x_ref.dtype), preferred_element_type=jnp.float32)
        sums_ref[...] += product

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        out_ref[...] = (sums_ref[...] if grouped else sums_ref[...] * scale_ref[0]).astype(out_ref.dtype)


def _whole_kernel(
    x_ref: Any, codes_ref: Any, scale_ref: Any, row_ref: Any, out_ref: Any, sums_ref: Any, *, grouped: bool
) -> None:
    del grouped  # of inputs that are rounded, weights have one scale for each output
    _clear_first(sums_ref)
    sums_ref[...] += jnp.dot(x_ref[...], codes_ref[...], preferred_element_type=jnp.int32)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        out_ref[...] = (sums_ref[...].astype(jnp.float32) * row_ref[...] * scale_ref[0]).astype(out_ref.dtype)


def _clear_first(sums_ref: Any) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        sums_ref[...] = jnp.zeros_like(sums_ref)


def _halves(codes: jax.Array, count: int) -> list[jax.Array]:
    """int8 codes as they are; of bytes the low and the high codes, by shifts of int32, which every TPU has."""
    if count == 1:
        return [codes]
    wide = codes.astype(jnp.int32)
    return [(wide << 28) >> 28, (wide << 24) >> 28]
