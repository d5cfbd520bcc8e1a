"""Which leaves scale the inputs of which matmuls: where a factor can be moved from one leaf into another."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from jaxcompress.trace._origin import Origin, rearrange, reshape_runs
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
    graph = _Graph(closed.jaxpr, [path for path, _ in leaves_with_paths(params)])
    found, seen = [], set()
    for eqn in closed.jaxpr.eqns:
        if eqn.primitive.name != "dot_general":
            continue
        for side in (0, 1):
            if (use := graph.consumer(eqn, side)) is None or (use[2], use[3]) in seen:
                continue
            fold = graph.fold(use[2], use[3])
            if fold is not None:
                seen.add((use[2], use[3]))
                found.append(fold)
    return found


_Leaf = tuple[int, tuple[int, ...]]


class _Graph:
    """A flat program: who makes each value, who reads it, and which values are leaves, re-arranged."""

    def __init__(self, jaxpr: Any, paths: Sequence[str]) -> None:
        self.jaxpr, self.paths = jaxpr, paths
        self.maker: dict[Any, Any] = {}
        self.readers: dict[Any, list[Any]] = {}
        self.origins = {
            var: Origin(n, tuple((axis,) for axis in range(len(var.aval.shape))))
            for n, var in enumerate(jaxpr.invars[: len(paths)])
        }
        for eqn in jaxpr.eqns:
            for var in {v for v in eqn.invars if not isinstance(v, core.Literal)}:
                self.readers.setdefault(var, []).append(eqn)
            self.maker |= dict.fromkeys(eqn.outvars, eqn)
            first = eqn.invars[0] if eqn.invars else None
            if not isinstance(first, core.Literal) and first in self.origins:
                moved = rearrange(eqn, self.origins[first])
                if moved is not None:
                    self.origins[eqn.outvars[0]] = moved
        self.outputs = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}

    def consumer(self, eqn: Any, side: int) -> tuple[int, tuple[int, ...], Any, tuple[int, ...]] | None:
        """(leaf, its summed axes, the input, its summed axes) of a plain matmul of an input with a leaf."""
        contracted, batch = eqn.params["dimension_numbers"]
        leaf, value = eqn.invars[side], eqn.invars[1 - side]
        if isinstance(leaf, core.Literal) or isinstance(value, core.Literal):
            return None
        origin = self.origins.get(leaf)
        if origin is None or value in self.origins or batch[side]:
            return None
        pairs = sorted(zip(contracted[1 - side], contracted[side], strict=True))
        axes = [origin.axes[axis] for _, axis in pairs]
        if any(len(own) != 1 for own in axes):
            return None
        return origin.leaf, tuple(own[0] for own in axes), value, tuple(axis for axis, _ in pairs)

    def fold(self, value: Any, axes: tuple[int, ...]) -> Fold | None:
        """The fold of an input of a matmul."""
        trace = _Trace(self)
        if not trace.back(value, axes) or not trace.producers:
            return None
        consumers: dict[int, tuple[int, ...]] = {}
        for var, own in trace.scaled.items():
            if var in self.outputs:
                return None
            for eqn in self.readers.get(var, []):
                if any(out in trace.scaled for out in eqn.outvars):
                    continue
                side = 1 - eqn.invars.index(var) if eqn.primitive.name == "dot_general" else None
                use = None if side is None else self.consumer(eqn, side)
                if use is None or use[2] is not var or use[3] != own or use[0] in consumers:
                    return None
                consumers[use[0]] = use[1]
        leaves = dict(trace.producers)
        if not consumers or set(leaves) & set(consumers) or any(not self._alone(n, trace) for n in leaves):
            return None
        if any(self._uses(n) != 1 for n in consumers):
            return None
        return Fold(
            producers=tuple((self.paths[n], own) for n, own in leaves.items()),
            consumers=tuple((self.paths[n], own) for n, own in consumers.items()),
        )

    def _uses(self, leaf: int) -> int:
        """How often a leaf is read as anything but a re-arrangement of itself."""
        own = [var for var, origin in self.origins.items() if origin.leaf == leaf]
        readers = [eqn for var in own for eqn in self.readers.get(var, [])]
        return sum(not any(out in self.origins for out in eqn.outvars) for eqn in readers)

    def _alone(self, leaf: int, trace: "_Trace") -> bool:
        """Whether a leaf is read once, and that within the fold."""
        return self._uses(leaf) == 1 and not any(v in self.outputs for v, o in self.origins.items() if o.leaf == leaf)


class _Trace:
    """The way back from one value."""

    def __init__(self, graph: _Graph) -> None:
        self.graph = graph
        self.producers: dict[int, tuple[int, ...]] = {}
        self.scaled: dict[Any, tuple[int, ...]] = {}

    def back(self, var: Any, axes: tuple[int, ...]) -> bool:
        """Whether leaves can scale the features along some axes of a value; notes them, and what is scaled too."""
        if isinstance(var, core.Literal):
            return bool((var.val == 0) if not hasattr(var.val, "shape") else (var.val == 0).all())
        if var in self.graph.origins:
            return self._leaf(self.graph.origins[var], axes, var.aval.shape)
        if var in self.scaled:
            return self.scaled[var] == axes
        eqn = self.graph.maker.get(var)
        handler = None if eqn is None else _HANDLERS.get(eqn.primitive.name)
        if handler is None:
            return False
        before = dict(self.producers), dict(self.scaled)
        self.scaled[var] = axes
        if handler(self, eqn, axes):
            return True
        self.producers, self.scaled = before
        return False

    def _leaf(self, origin: Origin, axes: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        own = [origin.axes[axis] for axis in axes]
        if any(len(each) != 1 for each in own) or origin.leaf in self.producers:
            return False
        leaf = self.graph.jaxpr.invars[origin.leaf].aval.shape
        if any(leaf[each[0]] != shape[axis] for each, axis in zip(own, axes, strict=True)):
            return False
        self.producers[origin.leaf] = tuple(each[0] for each in own)
        return True


def _all(trace: _Trace, eqn: Any, axes: tuple[int, ...]) -> bool:
    shape = eqn.outvars[0].aval.shape
    return all(_same_shape(var, shape) and trace.back(var, axes) for var in eqn.invars)


def _either(trace: _Trace, eqn: Any, axes: tuple[int, ...]) -> bool:
    # A leaf first: the scale of a norm stands beside what has been normalized.
    shape = eqn.outvars[0].aval.shape
    order = sorted(eqn.invars, key=lambda var: isinstance(var, core.Literal) or var not in trace.graph.origins)
    return any(not isinstance(var, core.Literal) and _same_shape(var, shape) and trace.back(var, axes) for var in order)


def _first(trace: _Trace, eqn: Any, axes: tuple[int, ...]) -> bool:
    return _same_shape(eqn.invars[0], eqn.outvars[0].aval.shape) and trace.back(eqn.invars[0], axes)


def _cases(trace: _Trace, eqn: Any, axes: tuple[int, ...]) -> bool:
    return all(trace.back(var, axes) for var in eqn.invars[1:])


def _transpose(trace: _Trace, eqn: Any, axes: tuple[int, ...]) -> bool:
    return trace.back(eqn.invars[0], tuple(eqn.params["permutation"][axis] for axis in axes))


def _broadcast(trace: _Trace, eqn: Any, axes: tuple[int, ...]) -> bool:
    places = {new: old for old, new in enumerate(eqn.params["broadcast_dimensions"])}
    var, shape = eqn.invars[0], eqn.outvars[0].aval.shape
    if any(axis not in places or var.aval.shape[places[axis]] != shape[axis] for axis in axes):
        return isinstance(var, core.Literal) and trace.back(var, axes)
    return trace.back(var, tuple(places[axis] for axis in axes))


def _reshape(trace: _Trace, eqn: Any, axes: tuple[int, ...]) -> bool:
    left, before = list(axes), []
    for old, new in reshape_runs(eqn.invars[0].aval.shape, eqn.params["new_sizes"]):
        own = [axis for axis in new if axis in left]
        # Features fill whole runs, or pieces would be scaled.
        if own and (own != new or left[: len(own)] != own):
            return False
        before += old if own else []
        left = left[len(own) :]
    return not left and trace.back(eqn.invars[0], tuple(before))


def _matmul(trace: _Trace, eqn: Any, axes: tuple[int, ...]) -> bool:
    contracted, batch = eqn.params["dimension_numbers"]
    for side in (1, 0):
        free = [a for a in range(eqn.invars[side].aval.ndim) if a not in contracted[side] and a not in batch[side]]
        start = len(batch[0])
        if side == 1:
            start += eqn.invars[0].aval.ndim - len(contracted[0]) - len(batch[0])
        places = dict(enumerate(batch[side])) | {start + i: axis for i, axis in enumerate(free)}
        if all(axis in places for axis in axes) and any(axis >= len(batch[0]) for axis in axes):
            return trace.back(eqn.invars[side], tuple(places[axis] for axis in axes))
    return False


def _relu(trace: _Trace, eqn: Any, axes: tuple[int, ...]) -> bool:
    return _all(trace, eqn, axes)


def _same_shape(var: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(var, core.Literal) or tuple(var.aval.shape) == tuple(shape)


_HANDLERS: dict[str, Callable[[_Trace, Any, tuple[int, ...]], bool]] = {
    "add": _all,
    "add_any": _all,
    "sub": _all,
    "max": _relu,
    "neg": _first,
    "mul": _either,
    "div": _first,
    "convert_element_type": _first,
    "copy": _first,
    "stop_gradient": _first,
    "sharding_constraint": _first,
    "select_n": _cases,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "dot_general": _matmul,
}


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
