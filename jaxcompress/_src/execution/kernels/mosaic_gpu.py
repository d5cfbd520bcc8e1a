"""Quantized matmuls for Hopper GPUs, in Pallas' Mosaic GPU.

Unmeasured, and never compiled to machine code: they have run in Pallas' interpreter and been lowered to the Mosaic GPU
dialect, layouts of registers included, on a machine without a GPU. Until `examples/benchmarks/device.py` shows that a
kernel is right on a device and beats what XLA makes of the plain product, nothing uses them unless asked by name.

A block of codes goes from shared memory through registers, where it becomes bfloat16, back to shared memory, where the
tensor cores read it beside the block of x. Weights are (inputs, outputs). The derivatives are those of the plain
products. Rows are padded to whole blocks.

Shape letters: M rows, K inputs, N outputs, G groups of inputs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Int8, UInt8

from jaxcompress._src.execution.kernels.plain import int4_product, int8_product, rows_batched, with_plain_derivatives

# 64 rows of codes: fewer have no layout in registers that can be written for the tensor cores.
_ROWS, _OUTPUTS, _INPUTS = 64, 128, 64
_STEPS = 4


def int8_matmul(
    x: BFloat16[Array, "M K"], codes: Int8[Array, "K N"], scale: Float[Array, "G N"], *, interpret: Any = None
) -> BFloat16[Array, "M N"]:
    """`x @ (codes * scale)`, summed in float32. Unmeasured, and never run on a device.

    One scale for each output is multiplied with the sums; those of groups with the codes, before they are rounded to
    bfloat16.

    Args:
        x: bfloat16.
        codes: of the weight.
        scale: one for each output (G = 1), or for K / G inputs.
        interpret: the parameters of Pallas' interpreter for GPUs, to run on any backend.

    Raises:
        ValueError: shapes or dtypes that `why_not_int8` names.
    """
    _require(why_not_int8(x, codes, scale))
    return _differentiable("int8", interpret)(x, codes, scale)


def int4_matmul(
    x: BFloat16[Array, "M K"], packed: UInt8[Array, "P N"], scale: Float[Array, "G N"], *, interpret: Any = None
) -> BFloat16[Array, "M N"]:
    """`int8_matmul` for codes that a `PackedArray` packs along K. Unmeasured, and never run on a device.

    A byte holds the codes of two neighbouring inputs, so the halves are multiplied with the even and the odd inputs,
    and nothing is interleaved in the kernel.

    Args:
        x: bfloat16.
        packed: K / 2 bytes for each output, low half first.
        scale: one for each output (G = 1), or for K / G inputs.
        interpret: the parameters of Pallas' interpreter for GPUs, to run on any backend.

    Raises:
        ValueError: shapes or dtypes that `why_not_int4` names.
    """
    _require(why_not_int4(x, packed, scale))
    return _differentiable("int4", interpret)(x, packed, scale)


def why_not_int8(x: Any, codes: Any, scale: Any) -> str | None:
    """Why `int8_matmul` does not take these, arrays or abstract ones; None: it does.

    Example:
        >>> x, codes = jnp.ones((3, 256), jnp.bfloat16), jnp.ones((256, 100), jnp.int8)
        >>> why_not_int8(x, codes, jnp.ones((1, 100)))
        'N must be a multiple of 128, got 100'
    """
    return _why_not(x, codes, scale, jnp.int8, 1)


def why_not_int4(x: Any, packed: Any, scale: Any) -> str | None:
    """Why `int4_matmul` does not take these, arrays or abstract ones; None: it does.

    Example:
        >>> x, packed = jnp.ones((3, 256)), jnp.ones((128, 128), jnp.uint8)
        >>> why_not_int4(x, packed, jnp.ones((1, 128)))
        'x must be bfloat16, got float32'
    """
    return _why_not(x, packed, scale, jnp.uint8, 2)


def _require(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(f"No Hopper kernel for this matmul: {reason}.")


def _why_not(x: Any, codes: Any, scale: Any, dtype: Any, per_byte: int) -> str | None:
    if codes.ndim != 2 or codes.dtype != dtype:
        return f"codes must be two-dimensional {jnp.dtype(dtype).name}, got {codes.dtype} of shape {codes.shape}"
    inputs, outputs = per_byte * codes.shape[0], codes.shape[1]
    if x.dtype != jnp.bfloat16:
        return f"x must be bfloat16, got {x.dtype}"
    if x.ndim != 2 or x.shape[1] != inputs:
        return f"x must be (rows, {inputs}), got {x.shape}"
    if inputs % (per_byte * _INPUTS) or not inputs:
        return f"K must be a multiple of {per_byte * _INPUTS}, got {inputs}"
    if outputs % _OUTPUTS or not outputs:
        return f"N must be a multiple of {_OUTPUTS}, got {outputs}"
    if scale.ndim != 2 or scale.shape[1] != outputs or not scale.shape[0] or inputs % scale.shape[0]:
        return f"scales must be (groups of K, {outputs}), got {scale.shape}"
    if (inputs // scale.shape[0]) % (per_byte * _INPUTS):
        return f"groups must be multiples of {per_byte * _INPUTS} inputs, got {inputs // scale.shape[0]}"
    return None


@functools.cache
def _differentiable(kind: str, interpret: Any) -> Any:
    kernel, plain = {"int8": (_int8, int8_product), "int4": (_int4, int4_product)}[kind]
    return with_plain_derivatives(rows_batched(functools.partial(kernel, interpret=interpret)), plain)


def _int8(x: jax.Array, codes: jax.Array, scale: jax.Array, *, interpret: Any) -> jax.Array:
    return _call([x], codes, scale, interpret)


def _int4(x: jax.Array, packed: jax.Array, scale: jax.Array, *, interpret: Any) -> jax.Array:
    return _call([x[:, 0::2], x[:, 1::2]], packed, scale, interpret)


def _call(xs: list[jax.Array], codes: jax.Array, scale: jax.Array, interpret: Any) -> jax.Array:
    """One warpgroup for each block of rows and outputs; `codes` has a row for each column of the `xs`."""
    outputs, groups, rows = codes.shape[1], scale.shape[0], xs[0].shape[0]
    padding = -rows % _ROWS
    xs = [jnp.pad(x, ((0, padding), (0, 0))) for x in xs]
    wide = [plgpu.SMEM((_INPUTS, _OUTPUTS), jnp.bfloat16, transforms=_tiles(_OUTPUTS, jnp.bfloat16)) for _ in xs]
    sums = plgpu.SMEM((_ROWS, _OUTPUTS), jnp.bfloat16, transforms=_tiles(_OUTPUTS, jnp.bfloat16))
    kernel = plgpu.kernel(
        functools.partial(_kernel, halves=len(xs), groups=groups),
        out_type=jax.ShapeDtypeStruct((rows + padding, outputs), jnp.bfloat16),
        grid=((rows + padding) // _ROWS, outputs // _OUTPUTS),
        grid_names=("rows", "outputs"),
        scratch_types=[wide, sums, plgpu.SMEM((_OUTPUTS,), jnp.float32), plgpu.Barrier()],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    return kernel(*xs, codes, scale.astype(jnp.float32))[:rows]


def _kernel(*refs: Any, halves: int, groups: int) -> None:
    *x_refs, codes_ref, scale_ref, out_ref, wide_refs, sums_ref, last_ref, barrier = refs
    rows = pl.ds(lax.axis_index("rows") * _ROWS, _ROWS)
    outputs = pl.ds(lax.axis_index("outputs") * _OUTPUTS, _OUTPUTS)
    blocks = codes_ref.shape[0] // _INPUTS
    blocks_per_group = blocks // groups if groups > 1 else blocks

    def add_up(sums: Any) -> Any:
        def add(_: Any, *parts: Any) -> None:
            *x_parts, codes_part, scale_part = parts
            for codes, wide_ref in zip(_halves(codes_part[...], halves), wide_refs, strict=True):
                weight = codes.astype(jnp.float32)
                if groups > 1:
                    weight = weight * lax.broadcast_in_dim(scale_part[0], weight.shape, (1,))
                wide_ref[...] = weight.astype(jnp.bfloat16)
            plgpu.commit_smem()
            for x_part, wide_ref in zip(x_parts, wide_refs, strict=True):
                plgpu.wgmma(sums, x_part, wide_ref)
            # The next block is written where this one is read.
            plgpu.wgmma_wait(0)

        x_spec = plgpu.BlockSpec((_ROWS, _INPUTS), lambda k: (0, k), transforms=_tiles(_INPUTS, jnp.bfloat16))
        codes_spec = plgpu.BlockSpec((_INPUTS, _OUTPUTS), lambda k: (k, 0), transforms=_tiles(_OUTPUTS, jnp.int8))
        scale_spec = plgpu.BlockSpec((1, _OUTPUTS), lambda k: (lax.div(k, blocks_per_group), 0))
        pipeline = plgpu.emit_pipeline(
            add, grid=(blocks,), in_specs=[*[x_spec] * halves, codes_spec, scale_spec], max_concurrent_steps=_STEPS
        )
        pipeline(*(ref.at[rows, :] for ref in x_refs), codes_ref.at[:, outputs], scale_ref.at[:, outputs])
        return sums[...]

    sums = plgpu.ACC((_ROWS, _OUTPUTS), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
    total = pl.run_scoped(add_up, sums)
    if groups == 1:
        plgpu.copy_gmem_to_smem(scale_ref.at[0, outputs], last_ref, barrier)
        plgpu.barrier_wait(barrier)
        total = total * lax.broadcast_in_dim(last_ref[...], total.shape, (1,))
    sums_ref[...] = total.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(sums_ref, out_ref.at[rows, outputs])
    plgpu.wait_smem_to_gmem(0)


def _halves(codes: jax.Array, count: int) -> list[jax.Array]:
    """int8 codes as they are; of bytes the low and the high codes."""
    if count == 1:
        return [codes]
    wide = codes.astype(jnp.int32)
    return [(wide << 28) >> 28, (wide << 24) >> 28]


def _tiles(columns: int, dtype: Any) -> tuple[Any, ...]:
    """How a block lies in shared memory, as the tensor cores read it."""
    bits = 8 * jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * bits)
    return plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle)
