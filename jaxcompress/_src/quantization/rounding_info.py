"""What rounding did to each leaf, or to each entry of a stack: stored bits, and errors where inputs are known."""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp

from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.solvers.outputs import output_errors
from jaxcompress._src.tree.maps import leaves_by_path, leaves_with_paths, map_with_path
from jaxcompress._src.types import Params, is_compressed
from jaxcompress._src.weights.infos import Info, entry_infos, entry_names
from jaxcompress._src.weights.matrices import (
    EvidentLeaf,
    TableLeaf,
    calibrated_leaves_and_tables,
    checked_weight,
)

FALLBACKS = {"keep": "rounded to nearest", "zero": "set to 0"}
"""What became of weights whose inputs were never seen, for the warning."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundingInfo(Info):
    """What rounding made of one leaf, or of one stack entry; see `Info` for the other fields.

    `error_before` is of rounding every weight to the nearest, with the same spec.

    Attributes:
        bits_per_weight: what is stored of the leaf, scales and zero points included.
    """

    bits_per_weight: float

    @classmethod
    def of(cls, leaf: Any, **figures: Any) -> "RoundingInfo":
        """With the bits of a leaf, compressed or not."""
        bits = leaf.nbits if is_compressed(leaf) else 8 * leaf.size * jnp.dtype(leaf.dtype).itemsize
        return cls(bits_per_weight=bits / max(math.prod(leaf.shape), 1), **figures)


@on_auto_axes
def rounding_errors(
    params: Params, compressed: Params, statistics: Params, *, layouts: Params | None = None
) -> dict[str, RoundingInfo]:
    """The error of each compressed leaf on the calibration rows: what one-shot methods return beside their trees.

    For `quantize`, `fixed_point`, `cluster` and whatever else knows no statistics: sqrt(Σ |x W - x W'|² / Σ |x W|²),
    and for tables that are looked up sqrt(Σ_r n_r |w_r - w'_r|² / Σ_r n_r |w_r|²), n_r being how often row r was read.

    Args:
        params: the dense tree.
        compressed: the same tree with some leaves compressed.
        statistics: from `calibration.input_statistics`, with "gram"; of the dense model.
        layouts: from `trace.layouts`; needed where kernels are not (in..., out).

    Returns:
        A `RoundingInfo` with `bits_per_weight` and `error` for every compressed leaf that has statistics, by path
        (`path[i]` for each entry of a stack).

    Raises:
        ValueError: no such leaf; one with another shape than in `params`, with statistics of another width, or with NaN
            or Inf. Names the leaf.

    Example:
        >>> from jaxcompress.calibration import input_statistics
        >>> from jaxcompress.quantization import QuantSpec, quantize
        >>> params = {"kernel": jnp.array([[0.6], [7.0]])}
        >>> statistics = input_statistics(lambda p, x: x @ p["kernel"], params, [(jnp.array([[5.0, 0.0]]),)])
        >>> small, _ = quantize(params, QuantSpec(bits=4, convention="narrow"))  # 0.6 becomes 1
        >>> round(rounding_errors(params, small, statistics)["kernel"].error, 3)
        0.667
    """
    new = leaves_by_path(compressed)
    small = {path for path, leaf in new.items() if is_compressed(leaf)}

    def not_small(params: Params) -> Params:
        return map_with_path(lambda path, _: None if path in small else False, params)

    entries = calibrated_leaves_and_tables(params, statistics, needs="gram", select=not_small, layouts=layouts)
    return {name: info for entry in entries for name, info in _infos(entry, new[entry.path]).items()}


def storage_infos(compressed: Params, layouts: Params) -> dict[str, RoundingInfo]:
    """Of methods without data: the bits of every leaf that has a layout, by the names of its stack entries."""
    leaves = leaves_by_path(compressed)
    return {
        name: RoundingInfo.of(leaves[path])
        for path, layout in leaves_with_paths(layouts)
        for name in entry_names(path, leaves[path].shape, layout)
    }


def _infos(entry: EvidentLeaf, leaf: Any) -> dict[str, RoundingInfo]:
    if tuple(leaf.shape) != tuple(entry.weight.shape):
        raise ValueError(
            f"Leaf {entry.path!r} has shape {tuple(entry.weight.shape)} in `params`, {tuple(leaf.shape)} compressed."
        )
    dense, rounded = (entry.matrix(array) for array in (entry.weight, checked_weight(entry.path, leaf)))
    unseen = None
    if isinstance(entry, TableLeaf):
        often = jnp.sqrt(entry.counts.rows)[None, None]
        gram, dense, rounded = jnp.eye(dense.shape[1])[None], dense * often, rounded * often
    else:
        gram, unseen = entry.gram, entry.unseen
    error = output_errors(gram, dense, rounded, groups=entry.layout.groups)
    return entry_infos(entry, functools.partial(RoundingInfo.of, leaf), errors={"error": error}, unseen=unseen)
