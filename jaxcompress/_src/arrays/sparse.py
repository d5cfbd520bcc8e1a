"""From a plain array and a mask to a sparse array, and the name that covers both kinds."""

import functools
import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped, UInt8

from jaxcompress._src.arrays.bitmask import BitmaskSparseArray
from jaxcompress._src.arrays.n_of_m import NMSparseArray
from jaxcompress._src.arrays.packed import pack
from jaxcompress._src.meshes import on_auto_axes

SparseArray: TypeAlias = BitmaskSparseArray | NMSparseArray
"""Either storage; usable in `isinstance`."""


@on_auto_axes
def sparsify(
    array: Shaped[Array, "..."],
    mask: Bool[Array, "..."],
    *,
    pattern: tuple[int, int] | None = None,
    axis: int = -1,
    stack_ndim: int = 0,
    shards: int = 1,
) -> SparseArray:
    """Stores `array` where `mask` is set. The counts are data, so this runs outside `jit`.

    Args:
        array: any dtype; at least one unstacked axis.
        mask: of the same shape.
        pattern: (N, M): at most N of every M consecutive entries along `axis` are set in `mask`; gives values and
            places. None: a bit mask.
        axis: the axis of the pattern.
        stack_ndim: number of leading axes that are stacked copies (layers, experts); for the bit mask only.
        shards: equal runs of rows that may lie on different devices; for the bit mask only.

    Returns:
        An `NMSparseArray` with a pattern, else a `BitmaskSparseArray`.

    Raises:
        ValueError: shapes differ, `shards` does not divide the rows, or the mask breaks the pattern.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[1.0, 0.0, 0.0, 2.0], [0.0, 3.0, 4.0, 0.0]])
        >>> sparsify(x, x != 0, pattern=(2, 4)).values
        Array([[1., 2.],
               [3., 4.]], dtype=float32)
        >>> sparsify(x, x != 0).values
        Array([[1., 2., 3., 4.]], dtype=float32)
    """
    if mask.shape != array.shape or array.ndim - stack_ndim < 1:
        raise ValueError(
            f"Array of shape {array.shape}, {stack_ndim} stacked axes and mask of shape {mask.shape} do not fit."
        )
    if pattern is not None:
        return _sparsify_n_of_m(array, mask, pattern, axis if axis < 0 else axis - array.ndim)
    return _sparsify_bitmask(np.asarray(array), np.asarray(mask), stack_ndim, shards)


@on_auto_axes
def sparsify_like(array: Shaped[Array, "..."], like: SparseArray) -> SparseArray:
    """Stores `array` at the entries that `like` stores; nothing of `like` but its values changes.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[1.0, 0.0, 0.0, 2.0]])
        >>> sparsify_like(10 * x, sparsify(x, x != 0)).materialize()
        Array([[10.,  0.,  0., 20.]], dtype=float32)
    """
    if isinstance(like, NMSparseArray):
        return sparsify(array, like.mask(), pattern=like.pattern, axis=like.axis)
    shards, stack_ndim = like.values.shape[-2], like.starts.ndim - 1
    return sparsify(array, like.mask(), stack_ndim=stack_ndim, shards=shards)


def _sparsify_bitmask(array: np.ndarray, mask: np.ndarray, stack_ndim: int, shards: int) -> BitmaskSparseArray:
    stack, rows = array.shape[:stack_ndim], array.shape[stack_ndim]
    if shards < 1 or rows % shards:
        raise ValueError(f"`shards` must divide the {rows} rows of an array of shape {array.shape}, got {shards}.")
    row_shape = array.shape[stack_ndim + 1 :]
    flat = mask.reshape(*stack, rows, math.prod(row_shape))
    counts = flat.sum(axis=-1, dtype=np.int64).reshape(*stack, shards, rows // shards)
    starts = (np.cumsum(counts, axis=-1) - counts).reshape(*stack, rows).astype(np.int32)
    # At least one slot, because Orbax cannot save arrays of size 0.
    longest = max(int(counts.sum(axis=-1).max(initial=0)), 1)
    run_mask = mask.reshape(math.prod(stack) * shards, rows // shards * flat.shape[-1])
    values = np.zeros((len(run_mask), longest), array.dtype)
    for line, run, kept in zip(values, array.reshape(run_mask.shape), run_mask, strict=True):
        line[: kept.sum()] = run[kept]
    index = pack(flat.astype(np.uint8), bits=1)
    values = jnp.asarray(values.reshape(*stack, shards, longest))
    return BitmaskSparseArray(values=values, index=index, starts=jnp.asarray(starts), row_shape=row_shape)


def _sparsify_n_of_m(
    array: Shaped[Array, "..."], mask: Bool[Array, "..."], pattern: tuple[int, int], axis: int
) -> NMSparseArray:
    kept, run = pattern
    if not 1 <= kept <= run:
        raise ValueError(f"`pattern` (N, M) needs 1 <= N <= M, got {pattern}.")
    values, places, fits = _pick(array, mask, kept, run, axis)
    if not bool(fits):
        raise ValueError(f"The mask keeps more than {kept} of {run} entries along axis {axis} of shape {array.shape}.")
    index = pack(places, bits=max((run - 1).bit_length(), 1), axis=axis)
    return NMSparseArray(values=values, index=index, pattern=pattern, axis=axis, width=array.shape[axis])


@functools.partial(jax.jit, static_argnames=("kept", "run", "axis"))
def _pick(
    array: Shaped[Array, "..."], mask: Bool[Array, "..."], kept: int, run: int, axis: int
) -> tuple[Shaped[Array, "..."], UInt8[Array, "..."], Bool[Array, ""]]:
    """The values and places of the kept entries of each run, and whether no run has more than `kept`."""
    at = axis + array.ndim
    padding = [(0, -array.shape[at] % run if i == at else 0) for i in range(array.ndim)]
    array, mask = jnp.pad(array, padding), jnp.pad(mask, padding)
    count = array.shape[at] // run
    runs = (*array.shape[:at], count, run, *array.shape[at + 1 :])
    stored = (*array.shape[:at], count * kept, *array.shape[at + 1 :])
    clean = jnp.where(mask, array, jnp.zeros((), array.dtype)).reshape(runs)
    mask = mask.reshape(runs)
    # A stable sort brings the kept places of each run to the front; then into ascending order.
    places = jax.lax.slice_in_dim(jnp.argsort(~mask, axis=at + 1, stable=True), 0, kept, axis=at + 1)
    places = jnp.sort(places, axis=at + 1)
    values = jnp.take_along_axis(clean, places, axis=at + 1)
    fits = (mask.sum(axis=at + 1) <= kept).all()
    return values.reshape(stored), places.astype(jnp.uint8).reshape(stored), fits
