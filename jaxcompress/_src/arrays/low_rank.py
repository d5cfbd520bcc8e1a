"""Two thin factors in place of an array, and perhaps what they leave over."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.types import is_compressed


@functools.partial(jax.tree_util.register_dataclass, data_fields=["left", "right", "residual"], meta_fields=["dtype"])
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LowRankArray:
    """A sum of `rank` products of two arrays, each of which varies along some of the axes only.

    Invariant: `original ≈ (left * right).sum(-1) + residual`. Each factor has the logical axes, of full size or of size
    1, and the rank as its last one. An axis that both factors have in full is a stack: one factorization per entry. So
    a kernel of shape (in, out) has `left` (in, 1, rank) and `right` (1, out, rank); under a scan of L layers they are
    (L, in, 1, rank) and (L, 1, out, rank). `residual` has the logical shape and dtype.

    Attributes:
        left: floats, plain or compressed (a `QuantizedArray`, say).
        right: floats, plain or compressed.
        dtype: logical dtype; sums are made in float32 at least.
        residual: None, or an array that is added, plain or compressed.
    """

    left: Any
    right: Any
    dtype: jnp.dtype
    residual: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        sizes = zip(self.left.shape[:-1], self.right.shape[:-1], strict=True)
        return tuple(n if m == 1 else m for n, m in sizes)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.left.shape) - 1

    @property
    def size(self) -> int:
        """Number of logical entries."""
        return math.prod(self.shape)

    @property
    def rank(self) -> int:
        """Number of products that are added up."""
        return self.left.shape[-1]

    @property
    def nbits(self) -> int:
        """Stored bits: factors and residual."""
        return sum(8 * leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.nbits // 8

    @on_auto_axes
    def materialize(self) -> Float[Array, "..."]:
        """The plain array, of the logical shape and dtype."""
        left, right = _plain(self.left), _plain(self.right)
        axes = range(self.ndim)
        of_left = [axis for axis in axes if left.shape[axis] == self.shape[axis]]
        of_right = [axis for axis in axes if right.shape[axis] == self.shape[axis]]
        total = jnp.einsum(
            left.reshape(*(left.shape[axis] for axis in of_left), self.rank),
            [*of_left, self.ndim],
            right.reshape(*(right.shape[axis] for axis in of_right), self.rank),
            [*of_right, self.ndim],
            list(axes),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.promote_types(self.dtype, jnp.float32),
        )
        if self.residual is not None:
            total = total + _plain(self.residual).astype(total.dtype)
        return total.astype(self.dtype)

    @on_auto_axes
    def take_rows(self, rows: Integer[Array, "..."]) -> Float[Array, "..."]:
        """`materialize()[rows]`, multiplying those rows only; `rows` index the first axis and must be in range."""
        length, flat = self.shape[0], rows.reshape(-1)
        parts = [_take(part, flat, length) for part in (self.left, self.right, self.residual)]
        chosen = dataclasses.replace(self, left=parts[0], right=parts[1], residual=parts[2])
        plain = jnp.broadcast_to(chosen.materialize(), (flat.size, *self.shape[1:]))
        return plain.reshape(*rows.shape, *self.shape[1:])


def _plain(part: Any) -> Array:
    return part.materialize() if is_compressed(part) else part


def _take(part: Any, rows: Integer[Array, " rows"], length: int) -> Any:
    """Rows of a part that varies along the first axis."""
    if part is None or part.shape[0] != length or length == 1:
        return part
    if hasattr(part, "take_rows"):
        return part.take_rows(rows)
    return _plain(part)[rows]
