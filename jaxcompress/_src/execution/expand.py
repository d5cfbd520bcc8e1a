"""Sparse leaves with their zeros stored: more memory, less time."""

from typing import Any

import jax

from jaxcompress._src.arrays.protocol import expanded
from jaxcompress._src.tree.maps import map_with_path
from jaxcompress._src.tree.unselected import is_unselected
from jaxcompress._src.types import Params, Selector, is_compressed


def expand_sparse(
    params: Params, *, max_bytes: int | None = None, select: Selector | None = None
) -> tuple[Params, dict[str, int]]:
    """Stores the zeros of sparse leaves, once, so that no call has to place the values between them.

    N:M and bit-mask arrays become plain arrays; quantized and shared values keep their codes, for every entry (int4 2:4
    becomes int4). Values are the same. Save the model as it was: this is for running it.

    Args:
        params: the tree.
        max_bytes: what the whole tree may take; leaves are expanded in the order of the tree as long as they fit, and
            the others stay as they are. None: no limit.
        select: which leaves; by default all.

    Returns:
        `(params, info)`: by path, how many bytes each leaf that was expanded takes more than before.

    Raises:
        ValueError: `max_bytes` is less than the tree takes already.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress.arrays import sparsify
        >>> w = jnp.array([[1.0, 0.0, 0.0, 2.0]])
        >>> params, info = expand_sparse({"w": sparsify(w, w != 0)})
        >>> params["w"], info
        (Array([[1., 0., 0., 2.]], dtype=float32), {'w': 3})
    """
    total = _nbytes(params)
    if max_bytes is not None and max_bytes < total:
        raise ValueError(f"`max_bytes` must be at least what the tree takes, {total}, got {max_bytes}.")
    marks = map_with_path(lambda *_: True, params) if select is None else select(params)
    info: dict[str, int] = {}

    def visit(path: str, leaf: Any, mark: Any) -> Any:
        if is_unselected(mark) or not mark or not is_compressed(leaf):
            return leaf
        more = _nbytes(jax.eval_shape(expanded, leaf)) - _nbytes(leaf)
        whole = expanded(leaf) if max_bytes is None or total + sum(info.values()) + more <= max_bytes else leaf
        if jax.tree.structure(whole) == jax.tree.structure(leaf):
            return leaf
        info[path] = more
        return whole

    return map_with_path(visit, params, marks), info


def _nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
