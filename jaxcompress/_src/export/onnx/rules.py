"""The table of primitives: which rule writes which."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxcompress._src.export.onnx import (
    dynamic_slices,
    elementwise,
    gather,
    movement,
    products,
    reductions,
    scatter,
    sorting,
    windows,
)
from jaxcompress._src.export.onnx.graph import Graph

Rule = Callable[[Graph, Any, list[Any]], Sequence[Any]]
"""`(graph, equation, values) -> outputs`; a value is a `Tensor` or a NumPy array that is known."""

RULES: Mapping[str, Rule] = {
    **elementwise.RULES,
    **movement.RULES,
    **reductions.RULES,
    **dynamic_slices.RULES,
    **gather.RULES,
    **scatter.RULES,
    **products.RULES,
    **windows.RULES,
    **sorting.RULES,
}
