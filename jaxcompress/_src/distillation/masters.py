"""Wide copies of narrow parameters: what the optimizer changes, while the model sees their casts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxcompress._src.tree.maps import flatten_like
from jaxcompress._src.tree.partition import partition_trainable
from jaxcompress._src.tree.unselected import Unselected, is_unselected
from jaxcompress._src.types import Params, Selector


def masters_of(params: Params, dtype: DTypeLike, select: Selector | None) -> Params:
    """A wide copy of every trained float that is narrower, `Unselected` elsewhere.

    Args:
        params: the tree; compressed arrays are taken apart.
        dtype: of the copies.
        select: leaves that are trained; by default all.

    Raises:
        ValueError: `dtype` is no float, or no trained leaf is narrower.

    Example:
        >>> masters_of({"w": jnp.ones(2, "bfloat16"), "scale": jnp.ones(2)}, "float32", None)
        {'scale': Unselected, 'w': Array([1., 1.], dtype=float32)}
    """
    wide = jnp.dtype(dtype)
    if not jnp.issubdtype(wide, jnp.floating):
        raise ValueError(f"`master_dtype` must be a float, got {wide}.")
    trained, _ = partition_trainable(params, select=select)
    dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(trained)})
    masters = jax.tree.map(lambda x: x.astype(wide) if x.dtype.itemsize < wide.itemsize else Unselected, trained)
    if not jax.tree.leaves(masters):
        raise ValueError(f"`master_dtype` is {wide}, but the trained leaves are {', '.join(dtypes) or 'none'}.")
    return masters


def widened(params: Params, masters: Params) -> Params:
    """The parameters with the masters in their places; without any (an empty tuple) as they are."""
    if _is_empty(masters):
        return params
    return _merged(lambda master, leaf: leaf if is_unselected(master) else master, masters, params)


def narrowed(wide: Params, masters: Params, params: Params) -> Params:
    """What the model sees of widened parameters: leaves with a master are cast to the dtypes of `params`."""
    if _is_empty(masters):
        return wide

    def cast(master: Any, leaf: Any, like: Any) -> Any:
        return leaf if is_unselected(master) else leaf.astype(like.dtype)

    return _merged(cast, masters, wide, params)


def renewed(masters: Params, wide: Params) -> Params:
    """The masters among widened parameters."""
    if _is_empty(masters):
        return masters
    return _merged(lambda master, leaf: master if is_unselected(master) else leaf, masters, wide)


def _merged(fn: Callable[..., Any], masters: Params, *trees: Params) -> Params:
    """`fn(master or Unselected, *leaves)` in the structure of whole parameters."""
    entries, treedef = jax.tree.flatten(masters, is_leaf=is_unselected)
    return treedef.unflatten(map(fn, entries, *(flatten_like(treedef, tree) for tree in trees)))


def _is_empty(masters: Params) -> bool:
    return isinstance(masters, tuple) and not masters
