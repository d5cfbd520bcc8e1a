"""Which leaves scale the inputs of which matmuls: where a factor can be moved from one leaf into another."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jax.extend import core

from jaxcompress._src.trace.graph import Graph, graph_of
from jaxcompress._src.trace.scaling import Scaling
from jaxcompress._src.trace.traced import traced
from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.types import Params, is_compressed


class FoldedLeaf(NamedTuple):
    """One leaf of a fold. Axes are those of the leaf, not negative.

    Attributes:
        path: of the leaf.
        axes: flattened in this order, the features; those of all leaves of a fold agree.
        stack_axes: that scans run over, outermost first; each entry of the stack has features of its own.
    """

    path: str
    axes: tuple[int, ...]
    stack_axes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fold:
    """Leaves that can be divided by what others are multiplied by, without a change of the function.

    Attributes:
        producers: scales, biases or kernels whose outputs reach the consumers and nothing else, through operations that
            a positive factor of each feature passes.
        consumers: kernels that sum over these features.
    """

    producers: tuple[FoldedLeaf, ...]
    consumers: tuple[FoldedLeaf, ...]


def folds(apply: Callable[..., Any], params: Params, *inputs: Any) -> list[Fold]:
    """The folds of a model, found in its jaxpr: no names, no layer classes.

    From the input of every kernel it walks back, feature axis in hand, through additions, products, transposes,
    reshapes, casts, relu, selections and matmuls that carry the features along, to leaves: the scale and bias of a
    norm, the kernel and bias of a layer (through a gated product: of one of its sides; through attention: of the
    values). A fold is there if all of what is scaled on the way goes nowhere else (a residual stream does).

    In the body of a `scan` it does the same. Leaves that the scan runs over (layers stacked by `nn.scan`) fold with one
    another, one vector of factors for each entry of the stack; those that all iterations share, with one another.

    Args:
        apply: `(params, *inputs) -> outputs`, pure.
        params: arrays, compressed arrays or `jax.ShapeDtypeStruct`.
        *inputs: trees of arrays, or of `jax.ShapeDtypeStruct`.

    Returns:
        In the order of the model. Compressed leaves take no factors: there is no fold with one. Kernels in branches and
        `while` loops, and leaves of several uses, have none; nor do a leaf of a stack and one that all iterations
        share, or the inside of a scan and what comes before or after.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> def apply(p, x):
        ...     y = x / jnp.linalg.norm(x, axis=-1, keepdims=True) * p["scale"][None] + p["bias"][None]
        ...     return y @ p["query"], y @ p["key"]
        >>> params = {"scale": jnp.ones(3), "bias": jnp.ones(3), "query": jnp.ones((3, 2)), "key": jnp.ones((3, 4))}
        >>> (fold,) = folds(apply, params, jnp.ones((5, 3)))
        >>> sorted(leaf.path for leaf in fold.producers), sorted(leaf.path for leaf in fold.consumers)
        (['bias', 'scale'], ['key', 'query'])

        Six layers, stacked:

        >>> def stacked(p, x):
        ...     return jax.lax.scan(lambda x, layer: (x + (x * layer["scale"]) @ layer["kernel"], None), x, p)[0]
        >>> (fold,) = folds(stacked, {"scale": jnp.ones((6, 1, 3)), "kernel": jnp.ones((6, 3, 3))}, jnp.ones((5, 3)))
        >>> fold.consumers
        (FoldedLeaf(path='kernel', axes=(1,), stack_axes=(0,)),)

    References:
        Xiao et al. 2023, "SmoothQuant", section 4.2; Lin et al. 2024, "AWQ", section 3.2 (both list modules by name).
    """
    graph = graph_of(traced(apply, params, inputs))
    compressed = {path for path, leaf in leaves_with_paths(params) if is_compressed(leaf)}

    def is_plain(fold: Fold) -> bool:
        return compressed.isdisjoint(leaf.path for leaf in fold.producers + fold.consumers)

    return list(filter(is_plain, _folds(graph, graph.uses())))


def _folds(graph: Graph, uses: Mapping[str, int]) -> Iterator[Fold]:
    seen = set()
    for place, eqn in enumerate(graph.jaxpr.eqns):
        if place in graph.bodies:
            yield from _folds(graph.bodies[place], uses)
        for side in (0, 1) if eqn.primitive.name == "dot_general" else ():
            use = _consumer(graph, eqn, side)
            if use is None or (use[2], use[3]) in seen:
                continue
            fold = _fold(graph, uses, use[2], use[3])
            if fold is not None:
                seen.add((use[2], use[3]))
                yield fold


def _fold(graph: Graph, uses: Mapping[str, int], value: Any, axes: tuple[int, ...]) -> Fold | None:
    """The fold of an input of a matmul."""
    trace = Scaling(graph)
    if not trace.back(value, axes) or not trace.producers:
        return None
    consumers: dict[int, tuple[int, ...]] = {}
    for var, features in trace.scaled.items():
        if var in graph.outputs:
            return None
        for eqn in graph.readers.get(var, []):
            if any(out in trace.scaled for out in eqn.outvars):
                if not trace.once(eqn):
                    return None
                continue
            side = 1 - eqn.invars.index(var) if eqn.primitive.name == "dot_general" else None
            use = None if side is None else _consumer(graph, eqn, side)
            if use is None or use[2] is not var or use[3] != features or use[0] in consumers:
                return None
            consumers[use[0]] = use[1]
    views = [graph.views[n] for n in (*trace.producers, *consumers)]
    # One that every iteration shares has one factor, one of a stack has one for each entry.
    if not consumers or len({view.stacked_by for view in views}) > 1 or any(uses[view.path] != 1 for view in views):
        return None
    return Fold(producers=_leaves(graph, trace.producers), consumers=_leaves(graph, consumers))


def _leaves(graph: Graph, axes_by_leaf: Mapping[int, tuple[int, ...]]) -> tuple[FoldedLeaf, ...]:
    views = [(graph.views[n], axes) for n, axes in axes_by_leaf.items()]
    return tuple(FoldedLeaf(view.path, axes, view.stack_axes) for view, axes in views)


def _consumer(graph: Graph, eqn: Any, side: int) -> tuple[int, tuple[int, ...], Any, tuple[int, ...]] | None:
    """(leaf, its summed axes, the input, its summed axes) of a plain matmul of an input with a leaf."""
    contracted, batch = eqn.params["dimension_numbers"]
    leaf, value = eqn.invars[side], eqn.invars[1 - side]
    origin = graph.origin(leaf)
    if origin is None or isinstance(value, core.Literal) or value in graph.origins or batch[side]:
        return None
    pairs = sorted(zip(contracted[1 - side], contracted[side], strict=True))
    summed = origin.whole([axis for _, axis in pairs])
    return None if summed is None else (origin.leaf, summed, value, tuple(axis for axis, _ in pairs))
