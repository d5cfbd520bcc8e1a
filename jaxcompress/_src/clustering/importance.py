"""From what a leaf reads to how much the error of each of its weights counts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.calibration.statistics import InputStatistics, LookupCounts
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.trace.layout import LeafLayout, default_layout
from jaxcompress._src.tree.maps import leaves_with_paths, map_with_path
from jaxcompress._src.tree.unselected import Unselected
from jaxcompress._src.types import Params, Selector
from jaxcompress._src.weights.matrices import MatrixLeaf
from jaxcompress._src.weights.unseen import fill_unseen, unseen_inputs, warn_unseen


@on_auto_axes
def input_importance(
    params: Params, statistics: Params, *, select: Selector | None = None, layouts: Params | None = None
) -> Params:
    """H = mean of x² of the input that a weight multiplies: the output error, for uncorrelated inputs.

    Of a table that is looked up, h is the share of the look-ups that a row gets. Weights that no row reached may not
    become anything: inputs that are 0 in every row count as much as the others do on average, and rows of a table that
    were never looked up count as if they had been once.

    Args:
        params: the tree.
        statistics: from `calibration.input_statistics`, with "gram" or "squared_sum".
        select: which leaves; by default all that have statistics.
        layouts: from `trace.layouts`, of the same model; by default kernels are (in..., out).

    Returns:
        A partial tree of arrays that broadcast against the leaves, fit for `cluster`.

    Raises:
        ValueError: no leaf has statistics; or a leaf has those of no rows, names it.

    Example:
        >>> from jaxcompress.calibration import input_statistics
        >>> from jaxcompress.trace import layouts
        >>> params, x = {"kernel": jnp.ones((2, 3))}, jnp.array([[1.0, 2.0], [3.0, 0.0]])
        >>> model = lambda p, x: x @ p["kernel"]
        >>> statistics = input_statistics(model, params, [(x,)])
        >>> input_importance(params, statistics, layouts=layouts(model, params, x))["kernel"].tolist()
        [[5.0], [2.0]]
    """
    known = map_with_path(lambda *_: None, params) if layouts is None else layouts
    marks = map_with_path(lambda *_: True, params) if select is None else select(params)

    def visit(path: str, leaf: Any, entry: Any, given: LeafLayout | None, mark: bool) -> Any:
        if not mark or not isinstance(entry, InputStatistics | LookupCounts):
            return Unselected
        layout = given if given is not None and given.is_weight else default_layout(path, leaf)
        if not bool((jnp.asarray(entry.count) > 0).any()):
            raise ValueError(f"Leaf {path!r} has statistics of no rows: its importance is not known.")
        if isinstance(entry, LookupCounts):
            return _spread(jnp.where(entry.rows > 0, entry.rows, 1.0) / entry.count, layout.output_axes, leaf.shape)
        importance, unseen[path] = _of_inputs(path, entry, layout, leaf.shape)
        return importance

    unseen: dict[str, Any] = {}
    importance = map_with_path(visit, params, statistics, known, marks)
    if not leaves_with_paths(importance):
        raise ValueError("No leaf has input statistics: gather them with `calibration.input_statistics`.")
    warn_unseen(unseen, "taken to count as much as the others do")
    return importance


def _of_inputs(
    path: str, entry: InputStatistics, layout: LeafLayout, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Mean squares in a shape that broadcasts against the leaf, and which inputs were never seen, (S, D)."""
    if entry.squared_sum is not None:
        squares = entry.squared_sum
    elif entry.gram is not None:
        squares = jnp.diagonal(entry.gram, axis1=-2, axis2=-1)
    else:
        raise ValueError(f"Leaf {path!r} has neither of the statistics 'gram' and 'squared_sum'; gather one of them.")
    mean = squares / jnp.where(entry.count > 0, entry.count, 1.0)[..., None]
    unseen = unseen_inputs(entry).reshape(-1, mean.shape[-1])
    filled = fill_unseen(mean.reshape(unseen.shape), unseen)
    blank = jnp.zeros(shape, jnp.float32)
    return MatrixLeaf(path=path, weight=blank, layout=layout).of_inputs(filled), unseen


def _spread(values: jax.Array, axes: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """Values in the order of `axes`, in a shape that broadcasts against the leaf."""
    sizes = [shape[axis] for axis in axes]
    order = np.argsort(axes).tolist()
    return values.reshape(sizes).transpose(order).reshape([n if i in axes else 1 for i, n in enumerate(shape)])
