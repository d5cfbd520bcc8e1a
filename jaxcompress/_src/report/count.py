"""Numbers about one leaf."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcompress._src.types import is_compressed, plain


def holds_numbers(leaf: Any) -> bool:
    """Whether a leaf is an array of numbers, compressed or abstract perhaps; random keys and Python scalars are not."""
    if is_compressed(leaf):
        return True
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def stored_bytes(leaf: Any) -> int:
    """Bytes of what is stored in memory, rounded up."""
    if is_compressed(leaf):
        return -(-leaf.nbits // 8)
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize


def count_nonzeros(leaf: Any) -> int | None:
    """Number of logical entries that are not zero (NaN is not); None for an abstract leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> count_nonzeros(jnp.array([0.0, -0.0, 1.0]))
        1
    """
    if _is_abstract(leaf):
        return None
    if isinstance(leaf, np.ndarray | np.generic):
        return int(np.count_nonzero(leaf))
    if 0 in leaf.shape:
        return 0
    # One sum per row, added up on the host: a single int32 would overflow above two billion weights.
    return int(np.asarray(_row_counts(leaf)).sum(dtype=np.int64))


def tied_to(leaves: Sequence[Any]) -> list[int | None]:
    """For each leaf, the number of the first one that is the same array, or None.

    Compressed leaves are the same if all their parts are. Abstract leaves are never: one `ShapeDtypeStruct` may stand
    for many arrays.
    """
    seen: dict[Any, int] = {}
    ties: list[int | None] = []
    for at, leaf in enumerate(leaves):
        identity = at if _is_abstract(leaf) else (type(leaf), *(id(part) for part in jax.tree.leaves(leaf)))
        first = seen.setdefault(identity, at)
        ties.append(None if first == at else first)
    return ties


@jax.jit
def _row_counts(leaf: Any) -> jax.Array:
    nonzero = plain(leaf) != 0
    return nonzero.sum(axis=-1, dtype=jnp.int32) if nonzero.ndim else nonzero.astype(jnp.int32)


def _is_abstract(leaf: Any) -> bool:
    return any(isinstance(part, jax.ShapeDtypeStruct | Tracer) for part in jax.tree.leaves(leaf))
