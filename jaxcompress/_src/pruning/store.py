"""Masked leaves in fewer bytes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.arrays.packed import PackedArray
from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.arrays.sparse import SparseArray, sparsify
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.pruning.patterns import NOfM, Pattern, innermost_input
from jaxcompress._src.trace.layout import LeafLayout
from jaxcompress._src.types import plain


@on_auto_axes
def store_masked(leaf: Any, mask: jax.Array, layout: LeafLayout, pattern: Pattern) -> Any:
    """A leaf without what its mask prunes: values and places for N:M, a bit mask otherwise. Outside `jit`.

    The codes of a quantized leaf are stored in the same way, under its scales; other compressed leaves are materialized
    first. A stack whose axes do not lead cannot be stored row by row, and stays a plain array with zeros.

    Args:
        leaf: plain or compressed.
        mask: True = kept.
        layout: gives the axes.
        pattern: of the mask; a mask that does not reach N:M everywhere (a schedule under way) gets a bit mask.
    """
    if isinstance(leaf, QuantizedArray):
        return _quantized(leaf, mask, layout, pattern)
    return _sparse(plain(leaf), mask, layout, pattern)


def _sparse(array: jax.Array, mask: jax.Array, layout: LeafLayout, pattern: Pattern) -> Any:
    if isinstance(pattern, NOfM):
        try:
            return sparsify(array, mask, pattern=(pattern.n, pattern.m), axis=innermost_input(layout))
        except ValueError:
            pass
    leading = layout.stack_axes == tuple(range(len(layout.stack_axes)))
    if not leading or array.ndim <= len(layout.stack_axes):
        return jnp.where(mask, array, 0)
    return sparsify(array, mask, stack_ndim=len(layout.stack_axes))


def _quantized(leaf: QuantizedArray, mask: jax.Array, layout: LeafLayout, pattern: Pattern) -> Any:
    stored = _sparse(leaf.codes(), mask, layout, pattern)
    if not isinstance(stored, SparseArray):
        return jnp.where(mask, leaf.materialize(), 0)
    packed = isinstance(getattr(leaf.data, "values", leaf.data), PackedArray)
    return dataclasses.replace(leaf, data=stored.with_packed_values(leaf.bits) if packed else stored)
