"""Leaves whose runs of weights are sums of entries of shared tables.

Shape letters: S stack entries, N runs, D weights of a run, M tables, K entries of a table.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Float64, Shaped, UInt8

from jaxcompress._src.arrays.additive import AdditiveCodebookArray
from jaxcompress._src.arrays.packed import pack
from jaxcompress._src.clustering.additive_fit import fit_additive
from jaxcompress._src.clustering.additive_spec import AdditiveSpec
from jaxcompress._src.clustering.leaves import checked_importance, checked_leaf, weighed_errors
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.trace.layout import LeafLayout
from jaxcompress._src.tree.maps import map_with_path
from jaxcompress._src.tree.unselected import Unselected, is_unselected
from jaxcompress._src.types import Params, Selector
from jaxcompress._src.weights.infos import Info, entry_names
from jaxcompress._src.weights.matrices import MatrixLeaf
from jaxcompress._src.weights.selection import selected_layouts


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdditiveInfo(Info):
    """What sums of entries made of one leaf, or of one stack entry; see `Info` for the other fields.

    `error` is sqrt(Σ h (w - w')² / Σ h w²); h is the importance, or 1.

    Attributes:
        errors: `error` after seeding and after each round; they never rise.
        bits_per_weight: what is stored of the leaf: codes, tables and scales.
    """

    errors: tuple[float, ...]
    bits_per_weight: float


@on_auto_axes
def additive_quantize(
    params: Params,
    spec: AdditiveSpec,
    *,
    importance: Params | None = None,
    select: Selector | None = None,
    layouts: Params | None = None,
) -> tuple[Params, dict[str, AdditiveInfo]]:
    """Replaces each run of weights by a sum of M entries, one from each of M tables that the whole leaf shares.

    Σ h (w - scale * Σ_m table_m[code_m])² is made small: the tables start as k-means of what the tables before them
    leave over; then, in turn, all tables together become the least squares of the weights under their codes, and each
    run gets better codes by beam search and by exchanging one code at a time. No step raises the error, and there are
    no random numbers. This is sparse coding with one atom, of weight 1, from each of M dictionaries; with M = 1 it is
    product quantization with the same table at all places.

    Runs lie along one input axis (along the one that the length of a run fills best, the last of equal ones), and a
    last run that is not full is stored whole. Each stacked copy has tables of its own. With at most K runs, the tables
    hold them all. Leaves that are such sums already are left as they are; other compressed leaves are materialized.

    Args:
        params: the tree.
        spec: length of runs, tables, entries.
        importance: h, a partial tree of arrays that broadcast against the leaves, as for `cluster`: `input_importance`
            or `calibration.fisher`. `Unselected`, None or no tree: 1. Where it is 0, weights may become anything; where
            it is 0 for a whole leaf or stacked copy, all of it counts alike.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`; without them kernels are (in..., out), embeddings (rows, features).

    Returns:
        `(params, info)`: an `AdditiveCodebookArray` for every selected leaf, and an `AdditiveInfo` by path (`path[i]`
        for each entry of a stack).

    Raises:
        ValueError: nothing is selected; a selected leaf is no float array, is a scalar, is sparse, holds NaN or Inf, or
            has stacked axes only; importance that is negative, not finite or of another shape. Names the leaf.
        TypeError: inside `jit`, `grad` or `vmap`: it runs on the host only. Names the leaf.

    Example:
        >>> kernel = jnp.array([[1.0, 0.0, 1.0], [2.0, 0.0, 2.0], [1.0, 3.0, 1.0], [2.0, 3.0, 2.0]])
        >>> spec = AdditiveSpec(length=2, tables=1, values=3, scaled=False)
        >>> small, info = additive_quantize({"kernel": kernel}, spec)
        >>> small["kernel"].codes().shape, small["kernel"].table.shape, info["kernel"].error
        ((2, 3, 1), (1, 1, 1, 3, 2), 0.0)

    References:
        Babenko and Lempitsky 2014, "Additive quantization for extreme vector compression"; Jégou, Douze and Schmid
        2011, "Product quantization for nearest neighbor search"; Egiazarian et al. 2024, "Extreme compression of large
        language models via additive quantization" (AQLM: runs of 8 weights, scales of output channels; its error is
        that of the outputs, for which h stands in here).
    """
    info: dict[str, AdditiveInfo] = {}

    def visit(path: str, leaf: Any, layout: Any, weight: Any) -> Any:
        if is_unselected(layout) or isinstance(leaf, AdditiveCodebookArray):
            return leaf
        dense, h = checked_leaf(path, leaf, zero=False), checked_importance(path, leaf, weight)
        h = _broadcast(h, dense.shape, layout.stack_axes)
        stored, errors = _stored(dense, h, _Runs.of(path, dense.shape, layout, spec.length), spec)
        info.update(_describe(MatrixLeaf(path=path, weight=dense, layout=layout), stored, h, errors))
        return stored

    known = map_with_path(lambda *_: Unselected, params) if importance is None else importance
    selected = selected_layouts(params, select=select, layouts=layouts)
    return map_with_path(visit, params, selected, known), info


class _Runs(NamedTuple):
    """Where the runs of a leaf lie.

    Attributes:
        shape: of the leaf.
        axis: of the runs.
        stack: axes of copies with tables of their own.
        outputs: axes that have a scale for each entry.
        length: D.
    """

    shape: tuple[int, ...]
    axis: int
    stack: tuple[int, ...]
    outputs: tuple[int, ...]
    length: int

    @classmethod
    def of(cls, path: str, shape: tuple[int, ...], layout: LeafLayout, length: int) -> "_Runs":
        free = layout.input_axes or layout.output_axes
        if not free:
            raise ValueError(
                f"Leaf {path!r} of shape {shape} has stacked axes only, none along which runs lie; exclude it."
            )
        padded = {axis: -(-shape[axis] // length) * length / max(shape[axis], 1) for axis in free}
        axis = min(free, key=lambda axis: (padded[axis], -axis))
        return cls(shape, axis, layout.stack_axes, tuple(a for a in layout.output_axes if a != axis), length)

    @property
    def order(self) -> tuple[int, ...]:
        """Stacked axes, then the others, the runs last."""
        others = [axis for axis in range(len(self.shape)) if axis not in (*self.stack, self.axis)]
        return (*self.stack, *others, self.axis)

    def split(self, array: Shaped[Array, "..."]) -> Shaped[Array, "S N D"]:
        """The runs of a leaf; the last of each line is filled with zeros."""
        moved = array.transpose(self.order)
        moved = jnp.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, -moved.shape[-1] % self.length)])
        stack = math.prod(self.shape[axis] for axis in self.stack)
        return moved.reshape(stack, moved.size // max(stack * self.length, 1), self.length)

    def join(self, codes: UInt8[Array, "S N M"]) -> UInt8[Array, "..."]:
        """Codes of runs, in the order of the leaf's axes, the tables last."""
        sizes = [self.shape[axis] for axis in self.order]
        sizes[-1] = -(-sizes[-1] // self.length)
        whole = codes.reshape(*sizes, codes.shape[-1])
        return whole.transpose(*np.argsort(self.order).tolist(), whole.ndim - 1)

    def sizes(self, *axes: int) -> tuple[int, ...]:
        """The size of the leaf on some axes, 1 on the others."""
        return tuple(n if axis in axes else 1 for axis, n in enumerate(self.shape))


def _stored(
    dense: Shaped[Array, "..."], h: Float32[Array, "..."], runs: _Runs, spec: AdditiveSpec
) -> tuple[AdditiveCodebookArray, Float64[np.ndarray, "S rounds1"]]:
    """The compressed leaf, and the error of each copy, relative to that of zeros, after each round."""
    w = dense.astype(jnp.float32)
    scale = _scales(w, (*runs.stack, *runs.outputs)).astype(spec.dtype) if spec.scaled else None
    unit = jnp.ones_like(w) if scale is None else jnp.broadcast_to(scale.astype(jnp.float32), w.shape)
    x = runs.split(jnp.where(unit > 0, w / jnp.where(unit > 0, unit, 1.0), 0.0))
    # The error of w is that of x, times the square of the scale.
    tables, codes, errors = _fit_stack(x, runs.split(_near_one(h) * _near_one(unit) ** 2), spec)
    stored = AdditiveCodebookArray(
        data=pack(runs.join(codes), bits=spec.bits, axis=runs.axis),
        table=tables.astype(spec.dtype).reshape(*runs.sizes(*runs.stack), *tables.shape[1:]),
        scale=scale,
        dtype=jnp.dtype(dense.dtype),
        axis=runs.axis - dense.ndim,
        width=dense.shape[runs.axis],
    )
    return stored, errors


def _fit_stack(
    x: Float32[Array, "S N D"], h: Float32[Array, "S N D"], spec: AdditiveSpec
) -> tuple[Float32[Array, "S M K D"], UInt8[Array, "S N M"], Float64[np.ndarray, "S rounds1"]]:
    """Tables, codes and errors of each copy."""
    if not x.size:
        tables = jnp.zeros((len(x), spec.tables, spec.values, spec.length))
        return tables, jnp.zeros((*x.shape[:2], spec.tables), jnp.uint8), np.zeros((len(x), spec.rounds + 1))
    fits = [fit_additive(*pair, spec) for pair in zip(x, h, strict=True)]
    total = np.asarray((h * x**2).sum((1, 2)), np.float64)[:, None]
    lost = np.asarray([fit.errors for fit in fits], np.float64)
    errors = np.where(total > 0, np.sqrt(lost / np.where(total > 0, total, 1.0)), 0.0)
    return jnp.stack([fit.tables for fit in fits]), jnp.stack([fit.codes for fit in fits]), errors


@functools.partial(jax.jit, static_argnames=("shape", "stack"))
def _broadcast(h: Any, shape: tuple[int, ...], stack: tuple[int, ...]) -> Float32[Array, "..."]:
    """The importance of each weight; in copies where nothing counts, everything counts the same."""
    h = jnp.broadcast_to(jnp.ones(()) if h is None else jnp.asarray(h, jnp.float32), shape)
    axes = tuple(axis for axis in range(len(shape)) if axis not in stack)
    largest = h.max(initial=0)
    counts = h.max(axes, keepdims=True, initial=0) > 0
    return jnp.where(counts, h, jnp.where(largest > 0, largest, 1.0))


@jax.jit
def _near_one(values: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """Divided by a power of two, which rounds nothing, so that the largest is near 1: no square overflows or gets 0."""
    _, exponent = jnp.frexp(values.max(initial=0))
    return jnp.ldexp(values, -exponent)


@functools.partial(jax.jit, static_argnames="channels")
def _scales(w: Float32[Array, "..."], channels: tuple[int, ...]) -> Float32[Array, "..."]:
    """The root mean square over all other axes, which are kept with size 1."""
    axes = tuple(axis for axis in range(w.ndim) if axis not in channels)
    largest = jnp.abs(w).max(axes, keepdims=True, initial=0)
    # Squares of what is below 1, so that they neither overflow nor all become 0.
    mean = jnp.square(w / jnp.where(largest > 0, largest, 1.0)).sum(axes, keepdims=True)
    return largest * jnp.sqrt(mean / max(math.prod(w.shape[axis] for axis in axes), 1))


def _describe(
    leaf: MatrixLeaf, stored: AdditiveCodebookArray, h: Shaped[Array, "..."], errors: Float64[np.ndarray, "S rounds1"]
) -> dict[str, AdditiveInfo]:
    bits = stored.nbits / max(leaf.weight.size, 1)
    rounds = [tuple(float(error) for error in steps) for steps in errors]
    named = zip(
        entry_names(leaf.path, leaf.weight.shape, leaf.layout), weighed_errors(leaf, stored, h), rounds, strict=True
    )
    return {name: AdditiveInfo(error=last, errors=steps, bits_per_weight=bits) for name, last, steps in named}
