"""What a weight costs: the factors of `units.expected_parameters`, `units.unit_sizes` and `select_units`."""

from jaxcompress._src.trace.layout import LeafLayout
from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.tree.unselected import is_unselected
from jaxcompress._src.types import Params, Selector


def parameter_costs(params: Params, select: Selector | None = None) -> dict[str, float]:
    """A cost of 1 for every weight of the selected leaves.

    Args:
        params: the tree.
        select: which leaves count; by default all. `tree.by_path("bert/encoder/.*")` counts the encoder of a BERT.

    Example:
        >>> from jaxcompress import tree
        >>> import jax.numpy as jnp
        >>> parameter_costs({"table": jnp.ones((9, 2)), "kernel": jnp.ones((2, 2))}, tree.by_path("kernel"))
        {'kernel': 1.0}
    """
    marks = leaves_with_paths(params if select is None else select(params))
    arrays = {path for path, leaf in leaves_with_paths(params) if hasattr(leaf, "shape")}
    return {path: 1.0 for path, mark in marks if path in arrays and (select is None or mark is True)}


def flop_costs(layouts: Params, params: Params) -> dict[str, float]:
    """FLOPs of each leaf's matmuls per weight, at the input shapes of the trace; leaves without any are left out.

    The products of activations with activations (attention scores) belong to no leaf, and are not counted.

    Args:
        layouts: of `trace.layouts`.
        params: the tree.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress import trace
        >>> params, x = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones((1, 3))}, jnp.ones((5, 2))
        >>> flop_costs(trace.layouts(lambda p, x: x @ p["kernel"] + p["bias"], params, x), params)
        {'kernel': 10.0}
    """
    found = leaves_with_paths(layouts, is_leaf=lambda leaf: isinstance(leaf, LeafLayout))
    flops = {path: layout.flops for path, layout in found if not is_unselected(layout)}
    sizes = {path: leaf.size for path, leaf in leaves_with_paths(params) if hasattr(leaf, "shape")}
    return {path: flops[path] / size for path, size in sizes.items() if size and flops.get(path)}
