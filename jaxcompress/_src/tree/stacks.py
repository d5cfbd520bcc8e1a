"""Stacked leaves in runs of layers, so that single layers can be selected."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.tree.maps import map_with_path
from jaxcompress._src.tree.paths import path_string
from jaxcompress._src.types import Params, Selector, is_compressed

_RUN = re.compile(r"(\d+):(\d+)")


def split_stacks(params: Params, at: Sequence[int], *, select: Selector) -> Params:
    """Stacked leaves as dicts of runs of layers: leaves that can be selected, rounded, pruned on their own.

    A leaf of shape (12, ...), split at 1 and 11, becomes `{"0:1": first, "1:11": middle, "11:12": last}`, whose paths
    are `leaf/0:1`, `leaf/1:11` and `leaf/11:12`. The model runs on it behind `join_stacks`; `trace`, calibration and
    techniques see the runs as leaves, but for `reconstruct`, which needs whole stacks. `jaxcompress.execute` runs a
    scan over such a stack run by run, each in its stored form.

    Args:
        params: the tree.
        at: where runs begin, along the first axis: whole numbers, ascending, none of them 0.
        select: the stacked leaves.

    Raises:
        ValueError: a place out of range or order; a selected leaf that is compressed, a run, or has no axes. Names the
            leaf.

    Example:
        >>> from jaxcompress.quantization import QuantSpec, quantize
        >>> from jaxcompress.tree import by_path
        >>> def apply(params, x):
        ...     return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]
        >>> params = split_stacks({"w": jnp.ones((3, 4, 4))}, [1], select=by_path("w"))
        >>> jax.tree.map(jnp.shape, params)
        {'w': {'0:1': (1, 4, 4), '1:3': (2, 4, 4)}}
        >>> small, _ = quantize(params, QuantSpec(bits=4), select=by_path("w/1:3"))
        >>> jax.tree.map(jnp.shape, small["w"]["0:1"]), small["w"]["1:3"].bits
        ((1, 4, 4), 4)
    """
    if not isinstance(at, Sequence) or not all(isinstance(k, int | np.integer) and type(k) is not bool for k in at):
        raise ValueError(f"`at` must be a list of whole numbers, got {at!r}.")

    def visit(path: str, leaf: Any, mark: bool) -> Any:
        if not mark:
            return leaf
        if is_compressed(leaf) or not leaf.shape or _RUN.fullmatch(path.rsplit("/", 1)[-1]):
            found = (
                "is compressed already" if is_compressed(leaf) else "is a run already" if leaf.shape else "has no axes"
            )
            raise ValueError(f"Leaf {path!r} {found}: only stacked arrays can be split.")
        ends = [0, *at, leaf.shape[0]]
        if any(end <= begin for begin, end in itertools.pairwise(ends)):
            raise ValueError(
                f"`at` must ascend, between 1 and {leaf.shape[0] - 1} for leaf {path!r} of shape {tuple(leaf.shape)}; "
                f"got {list(at)}."
            )
        return {f"{begin}:{end}": _cut(leaf, begin, end) for begin, end in itertools.pairwise(ends)}

    return map_with_path(visit, params, select(params), is_leaf=is_compressed)


def join_stacks(params: Params) -> Params:
    """The inverse of `split_stacks`, for plain arrays: what a model that knows nothing of it needs.

    Raises:
        ValueError: a run is compressed, or has another number of layers than its name says; names it.

    Example:
        >>> join_stacks({"b": jnp.ones(2), "w": {"0:1": jnp.zeros((1, 2)), "1:2": jnp.ones((1, 2))}})["w"]
        Array([[0., 0.],
               [1., 1.]], dtype=float32)
    """

    def visit(keys: Any, node: Any) -> Any:
        if (runs := _runs(node)) is None:
            return node
        stored = [key for key in runs if is_compressed(node[key])]
        if stored:
            raise ValueError(
                f"Leaf {path_string(keys)}/{stored[0]} is compressed: run `jaxcompress.execute` of a function that "
                "calls `join_stacks`, or materialize the tree first."
            )
        wrong = [key for key in runs if jnp.shape(node[key])[:1] != (_length(key),)]
        if wrong:
            found = tuple(jnp.shape(node[wrong[0]]))
            raise ValueError(
                f"Leaf '{path_string(keys)}/{wrong[0]}' must have {_length(wrong[0])} layers, got the shape {found}."
            )
        return _join([node[key] for key in runs])

    return jax.tree_util.tree_map_with_path(
        visit, params, is_leaf=lambda node: _runs(node) is not None or is_compressed(node)
    )


def _length(key: str) -> int:
    begin, end = key.split(":")
    return int(end) - int(begin)


def _runs(node: Any) -> list[str] | None:
    """The keys of a split stack, in order; JAX sorts "10:12" before "1:10"."""
    if not isinstance(node, Mapping) or not node or not all(isinstance(key, str) for key in node):
        return None
    matches = [_RUN.fullmatch(key) for key in node]
    if None in matches:
        return None
    places = sorted((int(run[1]), int(run[2]), run[0]) for run in matches if run is not None)
    follow = all(end == begin for (_, end, _), (begin, _, _) in itertools.pairwise(places))
    return [key for _, _, key in places] if places[0][0] == 0 and follow else None


def _cut(leaf: Any, begin: int, end: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((end - begin, *leaf.shape[1:]), leaf.dtype)
    return on_auto_axes(lambda: leaf[begin:end])()


@on_auto_axes
def _join(parts: list[Any]) -> jax.Array:
    return jnp.concatenate(parts)
