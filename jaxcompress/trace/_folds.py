"""Which leaves scale the inputs of which matmuls: where a factor can be moved from one leaf into another."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from jaxcompress.trace._scaling import Graph, Scaling
from jaxcompress.trace._walk import as_body, called_body, walk
from jaxcompress.tree import leaves_with_paths
from jaxcompress.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fold:
    """Leaves that can be divided by what others are multiplied by, without a change of the function.

    Attributes:
        producers: (path, axes): of scales, biases or kernels whose outputs reach the consumers and nothing else,
            through operations that a positive factor of each feature passes. Flattened, the axes are the features.
        consumers: (path, axes): of kernels that sum over these features.
    """

    producers: tuple[tuple[str, tuple[int, ...]], ...]
    consumers: tuple[tuple[str, tuple[int, ...]], ...]


def folds(apply: Callable[..., Any], params: Params, *inputs: Any) -> list[Fold]:
    """The folds of a model, found in its jaxpr: no names, no layer classes.

    From the input of every kernel it walks back, feature axis in hand, through additions, products, transposes,
    reshapes, casts, relu, selections and matmuls that carry the features along, to leaves: the scale and bias of a
    norm, the kernel and bias of a layer (through a gated product: of one of its sides; through attention: of the
    values). A fold is there if all of what is scaled on the way goes nowhere else (a residual stream does).

    Args:
        apply: `(params, *inputs) -> outputs`, pure.
        params: arrays or `jax.ShapeDtypeStruct`.
        *inputs: trees of arrays, likewise.

    Returns:
        In the order of the model. Kernels in loops, and of several uses, have none.

    Example:
        >>> import jax.numpy as jnp
        >>> def apply(p, x):
        ...     y = x / jnp.linalg.norm(x, axis=-1, keepdims=True) * p["scale"][None] + p["bias"][None]
        ...     return y @ p["query"], y @ p["key"]
        >>> params = {"scale": jnp.ones(3), "bias": jnp.ones(3), "query": jnp.ones((3, 2)), "key": jnp.ones((3, 4))}
        >>> (fold,) = folds(apply, params, jnp.ones((5, 3)))
        >>> sorted(path for path, _ in fold.producers), sorted(path for path, _ in fold.consumers)
        (['bias', 'scale'], ['key', 'query'])

    References:
        Xiao et al. 2023, "SmoothQuant", section 4.2; Lin et al. 2024, "AWQ", section 3.2 (both list modules by name).
    """
    closed = _inlined(jax.make_jaxpr(apply)(params, *inputs))
    graph = Graph(closed.jaxpr, [path for path, _ in leaves_with_paths(params)])
    found, seen = [], set()
    for eqn in closed.jaxpr.eqns:
        if eqn.primitive.name != "dot_general":
            continue
        for side in (0, 1):
            if (use := _consumer(graph, eqn, side)) is None or (use[2], use[3]) in seen:
                continue
            fold = _fold(graph, use[2], use[3])
            if fold is not None:
                seen.add((use[2], use[3]))
                found.append(fold)
    return found


def _fold(graph: Graph, value: Any, axes: tuple[int, ...]) -> Fold | None:
    """The fold of an input of a matmul."""
    trace = Scaling(graph)
    if not trace.back(value, axes) or not trace.producers:
        return None
    consumers: dict[int, tuple[int, ...]] = {}
    for var, own in trace.scaled.items():
        if var in graph.outputs:
            return None
        for eqn in graph.readers.get(var, []):
            if any(out in trace.scaled for out in eqn.outvars):
                continue
            side = 1 - eqn.invars.index(var) if eqn.primitive.name == "dot_general" else None
            use = None if side is None else _consumer(graph, eqn, side)
            if use is None or use[2] is not var or use[3] != own or use[0] in consumers:
                return None
            consumers[use[0]] = use[1]
    leaves = dict(trace.producers)
    if not consumers or set(leaves) & set(consumers) or any(not graph.is_alone(n) for n in leaves):
        return None
    if any(graph.uses(n) != 1 for n in consumers):
        return None
    return Fold(
        producers=tuple((graph.paths[n], own) for n, own in leaves.items()),
        consumers=tuple((graph.paths[n], own) for n, own in consumers.items()),
    )


def _consumer(graph: Graph, eqn: Any, side: int) -> tuple[int, tuple[int, ...], Any, tuple[int, ...]] | None:
    """(leaf, its summed axes, the input, its summed axes) of a plain matmul of an input with a leaf."""
    contracted, batch = eqn.params["dimension_numbers"]
    leaf, value = eqn.invars[side], eqn.invars[1 - side]
    if isinstance(leaf, core.Literal) or isinstance(value, core.Literal):
        return None
    origin = graph.origins.get(leaf)
    if origin is None or value in graph.origins or batch[side]:
        return None
    pairs = sorted(zip(contracted[1 - side], contracted[side], strict=True))
    axes = [origin.axes[axis] for _, axis in pairs]
    if any(len(own) != 1 for own in axes):
        return None
    return origin.leaf, tuple(own[0] for own in axes), value, tuple(axis for axis, _ in pairs)


def _inlined(closed: Any) -> Any:
    """The same program without calls, and without derivatives of their own: only values matter here."""

    def visit(eqn: Any, values: list[Any]) -> Sequence[Any]:
        body = called_body(eqn) if eqn.primitive.name in _CALLS else None
        if body is not None:
            return walk(body, values, visit)
        with eqn.ctx.manager:
            results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
        return list(results) if eqn.primitive.multiple_results else [results]

    return jax.make_jaxpr(lambda *values: walk(as_body(closed), list(values), visit))(*closed.in_avals)


_CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
)
