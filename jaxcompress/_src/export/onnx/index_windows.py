"""Where the windows of gathers and scatters lie.

Shape letters: B batch axes of the indices, W sizes of the windows on indexed axes, R the other axes of the operand.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcompress._src.export.onnx.dimensions import is_static
from jaxcompress._src.export.onnx.graph import Graph, Tensor


class Windows(NamedTuple):
    """Where the windows of a gather or scatter lie.

    Attributes:
        axes: the indexed axes of the operand, batching ones among them.
        sizes: W, of the windows on them; 1 on batching axes.
        dropped: those of these axes that the windows do not have.
        places: int64, (*B, *W, len(axes)): index tuples, within the operand.
        inside: bool, (*B, 1..., 1): whether the whole window lay inside; None where that is certain.
        batch: B.
    """

    axes: tuple[int, ...]
    sizes: tuple[Any, ...]
    dropped: frozenset[int]
    places: Tensor
    inside: Tensor | None
    batch: tuple[Any, ...]


def windows(
    graph: Graph,
    indices: Any,
    shape: Sequence[Any],
    *,
    index_map: Sequence[int],
    batching: Sequence[int],
    indices_batching: Sequence[int],
    dropped: Sequence[int],
    sizes: Sequence[Any],
    mode: Any,
) -> Windows:
    """The windows of a gather or scatter.

    Args:
        graph: where the nodes go.
        indices: (*B, indices).
        shape: of the operand.
        index_map: the axes that the indices are of.
        batching: axes of the operand that run along axes of the indices.
        indices_batching: those of the indices.
        dropped: indexed axes that the windows do not have.
        sizes: of the windows on all axes of the operand.
        mode: what becomes of windows outside; they are moved inside, and `inside` says which where that matters.
    """
    batch = tuple(indices.shape[:-1])
    axes = (*batching, *index_map)
    window = tuple(1 if axis in batching else sizes[axis] for axis in axes)
    rank = len(batch) + len(axes)
    parts, inside = [], None
    for at in indices_batching:
        parts.append(_line(graph, batch[at], rank, at))
    index = graph.full(indices)
    for number, axis in enumerate(index_map):
        name = graph.op("Slice", index.name, graph.ints(number), graph.ints(number + 1), graph.ints(index.ndim - 1))
        column = graph.reshape(Tensor(name, (*batch, 1), (*batch, 1), index.dtype), (*batch, *(1,) * len(axes)))
        start = graph.cast(column.name, index.dtype, np.int64)
        most = graph.op("Sub", graph.dimensions.size(shape[axis]), graph.dimensions.size(sizes[axis]))
        clipped = graph.op("Max", graph.op("Min", start, most), graph.ints(0))
        if mode == jax.lax.GatherScatterMode.FILL_OR_DROP:
            fits = graph.op("Equal", clipped, start)
            inside = fits if inside is None else graph.op("And", inside, fits)
        if not (is_static(sizes[axis]) and sizes[axis] == 1):
            clipped = graph.op("Add", clipped, _line(graph, sizes[axis], rank, len(batch) + len(batching) + number))
        parts.append(clipped)
    full = graph.shape((*batch, *window, 1))
    spread = [graph.op("Expand", graph.op("Unsqueeze", part, graph.ints(rank)), full) for part in parts]
    name = (
        graph.op("Concat", *spread, axis=rank)
        if spread
        else graph.op("Expand", graph.ints(0), graph.shape((*batch, *window, 0)))
    )
    places_shape = (*batch, *window, len(axes))
    places = Tensor(name, places_shape, places_shape, np.dtype(np.int64))
    held = (*batch, *(1,) * len(axes))
    flag = None if inside is None else Tensor(inside, held, held, np.dtype(bool))
    return Windows(axes, window, frozenset((*dropped, *batching)), places, flag, batch)


def _line(graph: Graph, size: Any, rank: int, axis: int) -> str:
    """0, 1, ... along one of `rank` axes."""
    count = graph.op("Squeeze", graph.dimensions.size(size))
    line = graph.op("Range", graph.scalar(0, np.int64), count, graph.scalar(1, np.int64))
    return graph.op("Reshape", line, graph.ints(*(-1 if at == axis else 1 for at in range(rank))))
