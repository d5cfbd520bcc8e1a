"""The gradient of a whole batch, from parts of it that are run one after another."""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.types import Params

Batch = Mapping[str, Any]


def split_batch(batch: Batch, count: int) -> tuple[Any, Callable[[Any], Batch]]:
    """A batch as micro-batches along a new leading axis.

    Micro-batch i holds the rows i, i + count, ...: rows that lie on one device stay there.

    Args:
        batch: arrays whose first axis runs over examples, at any depth; scalars belong to every micro-batch.
        count: how many.

    Returns:
        What a scan runs over, and the function that makes a batch of one entry of it.

    Raises:
        ValueError: an array cannot be split into so many equal parts, or there is none.

    Example:
        >>> parts, whole = split_batch({"x": jnp.arange(6), "scale": jnp.float32(2.0)}, 2)
        >>> whole([part[1] for part in parts])
        {'scale': Array(2., dtype=float32), 'x': Array([1, 3, 5], dtype=int32)}
    """
    leaves, treedef = jax.tree.flatten(batch)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    if not any(leaf.ndim for leaf in leaves):
        raise ValueError("The batch has no array with examples to split into micro-batches.")
    for leaf in leaves:
        if leaf.ndim and leaf.shape[0] % count:
            raise ValueError(f"`micro_batches` is {count}, which does not divide the {leaf.shape[0]} rows of a batch.")
    parts = [
        leaf.reshape(leaf.shape[0] // count, count, *leaf.shape[1:]).swapaxes(0, 1) for leaf in leaves if leaf.ndim
    ]

    def whole(part: Any) -> Batch:
        rows = iter(part)
        return treedef.unflatten([next(rows) if leaf.ndim else leaf for leaf in leaves])

    return parts, whole


def accumulate(
    fn: Callable[[Any, jax.Array, Any], tuple[Any, Any]], start: Any, parts: Any, keys: jax.Array, collections: Any
) -> tuple[Any, Any]:
    """The sum of `fn(part, key, collections)[0]` over micro-batches; the second result goes to the next one.

    Args:
        fn: `(part, key, collections) -> (tree of arrays to add up, new collections)`.
        start: zeros, in the shapes and shardings of what is added up; floats narrower than float32 are added up in
            float32.
        parts: from `split_batch`.
        keys: (count,), one for each.
        collections: at the start.

    Returns:
        The sums in the dtypes of `start`, and the last collections.
    """

    def body(carry: tuple[Any, Any], operands: tuple[Any, jax.Array]) -> tuple[tuple[Any, Any], None]:
        sums, new = fn(*operands, carry[1])
        return (jax.tree.map(lambda total, leaf: total + leaf.astype(total.dtype), carry[0], sums), new), None

    (total, collections), _ = jax.lax.scan(body, (jax.tree.map(_widened, start), collections), (parts, keys))
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), total, start), collections


def scaled(tree: Params, factor: jax.Array) -> Params:
    """Every array times a scalar, in its own dtype."""
    return jax.tree.map(lambda leaf: (leaf * factor).astype(leaf.dtype), tree)


def added(first: Params, second: Params) -> Params:
    """The sum of two trees."""
    return jax.tree.map(operator.add, first, second)


def _widened(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
