"""One random key per leaf."""

import jax

from jaxcompress._src.types import Params, is_compressed


def split_key(key: jax.Array, tree: Params) -> Params:
    """A tree of independent keys, one for each leaf of `tree` (compressed arrays are leaves).

    Args:
        key: a typed key (`jax.random.key`); it must not be used again.
        tree: gives the structure.

    Returns:
        A tree of scalar typed keys.

    Example:
        >>> import jax
        >>> keys = split_key(jax.random.key(0), {"a": 1, "b": 2})
        >>> keys["a"] == keys["b"]
        Array(False, dtype=bool)
    """
    treedef = jax.tree.structure(tree, is_leaf=is_compressed)
    return treedef.unflatten(list(jax.random.split(key, treedef.num_leaves)))
