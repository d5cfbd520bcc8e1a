"""Rows of a matrix by their traced number.

`x[i]` and `x.at[i].set(row)` also take negative numbers and those beyond the end: in a loop over rows that is several
small kernels more, to compile and to run. Here numbers beyond the end stand for the last row.
"""

from typing import Any

import jax
from jaxtyping import Array, Shaped


def row(x: Shaped[Array, "..."], index: Any) -> Shaped[Array, "..."]:
    """`x[index]`, for an index that is not negative."""
    return jax.lax.dynamic_index_in_dim(x, index, keepdims=False, allow_negative_indices=False)


def with_row(x: Shaped[Array, "..."], values: Shaped[Array, "..."], index: Any) -> Shaped[Array, "..."]:
    """`x.at[index].set(values)`, for an index that is not negative."""
    return jax.lax.dynamic_update_index_in_dim(x, values, index, 0, allow_negative_indices=False)


def rows(x: Shaped[Array, "..."], start: Any, count: int, axis: int = 0) -> Shaped[Array, "..."]:
    """`x[start : start + count]`, for a start that is not negative; `axis` may be another one."""
    return jax.lax.dynamic_slice_in_dim(x, start, count, axis, allow_negative_indices=False)


def with_rows(x: Shaped[Array, "..."], values: Shaped[Array, "..."], start: Any) -> Shaped[Array, "..."]:
    """`x.at[start : start + len(values)].set(values)`, for a start that is not negative."""
    return jax.lax.dynamic_update_slice_in_dim(x, values, start, 0, allow_negative_indices=False)
