"""Splitting a tree in two and putting it together again."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.tree.maps import flatten_like
from jaxcompress._src.tree.unselected import Unselected, is_unselected
from jaxcompress._src.types import Params, Selector, is_compressed


def partition_trainable(params: Params, *, select: Selector | None = None) -> tuple[Params, Params]:
    """Splits `params` into what an optimizer may change and the rest.

    Float arrays are trainable, the float parts of compressed arrays (scales) too; integer codes, floats of one byte,
    packed bytes, masks, keys and everything that is no array are not: an optimizer would otherwise keep moments for
    codes.

    Args:
        params: the tree; compressed arrays are taken apart.
        select: leaves to train; by default all.

    Returns:
        `(trainable, rest)`, each of the structure of `params` with `Unselected` where the other one has the leaf.
        `combine(trainable, rest)` is `params`.

    Example:
        >>> import jax.numpy as jnp
        >>> trainable, rest = partition_trainable({"codes": jnp.ones(2, "int8"), "scale": jnp.ones(2)})
        >>> trainable["codes"], rest["scale"]
        (Unselected, Unselected)
    """
    if select is None:
        return partition(_is_float, params)
    marks = jax.tree.map(
        lambda mark, leaf: jax.tree.map(lambda part: mark and _is_float(part), leaf), select(params), params
    )
    return (
        jax.tree.map(lambda mark, part: part if mark else Unselected, marks, params),
        jax.tree.map(lambda mark, part: Unselected if mark else part, marks, params),
    )


def partition(predicate: Callable[[Any], bool], tree: Params) -> tuple[Params, Params]:
    """Splits a tree by a predicate on its raw leaves: `(those where it holds, the others)`."""
    return (
        jax.tree.map(lambda leaf: leaf if predicate(leaf) else Unselected, tree),
        jax.tree.map(lambda leaf: Unselected if predicate(leaf) else leaf, tree),
    )


def combine(first: Params, second: Params) -> Params:
    """The tree whose parts are `first` and `second`; the inverse of `partition_trainable`.

    A leaf that neither has stays `Unselected`.

    Raises:
        ValueError: the structures differ, or both trees have the same leaf.

    Example:
        >>> combine({"a": 1, "b": Unselected}, {"a": Unselected, "b": 2})
        {'a': 1, 'b': 2}
    """
    leaves, treedef = jax.tree.flatten(first, is_leaf=is_unselected)
    return treedef.unflatten([_either(x, y) for x, y in zip(leaves, flatten_like(treedef, second), strict=True)])


def _either(x: Any, y: Any) -> Any:
    if not is_unselected(x) and not is_unselected(y):
        raise ValueError(f"`combine` needs each leaf in one of the trees only, got {x!r} and {y!r}.")
    return y if is_unselected(x) else x


def _is_float(leaf: Any) -> bool:
    if not hasattr(leaf, "dtype") or is_compressed(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return False
    # Floats of one byte are codes, or powers of two as scales: no step of an optimizer would move them.
    return leaf.dtype.itemsize > 1
