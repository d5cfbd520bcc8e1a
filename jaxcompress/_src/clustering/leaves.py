"""Checks of leaves whose weights are to share values, and of how much each weight counts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jaxcompress._src.arrays.sparse import SparseArray
from jaxcompress._src.clustering.spec import CodebookSpec
from jaxcompress._src.tree.checks import check_finite, is_traced
from jaxcompress._src.tree.unselected import is_unselected
from jaxcompress._src.types import CompressedArray, Params, Selector, plain
from jaxcompress._src.weights.matrices import MatrixLeaf
from jaxcompress._src.weights.selection import selected_layouts, without_misfits


def clusterable(params: Params, spec: CodebookSpec, *, select: Selector | None, layouts: Params | None) -> Params:
    """The layouts of the leaves that are to share values, without those that the groups of the spec do not divide.

    Raises:
        ValueError: nothing is selected; `select` asks for a leaf that the groups do not divide (names it).
    """
    layouts = selected_layouts(params, select=select, layouts=layouts)
    return without_misfits(layouts, params, lambda _, shape, layout: spec.blocks(shape, layout), select)


def checked_leaf(path: str, leaf: Any, *, zero: bool) -> jax.Array:
    """A leaf as plain floats.

    Args:
        path: for messages.
        leaf: plain or compressed.
        zero: whether the zeros of a sparse leaf will stay.

    Raises:
        ValueError: it is no float array, is a scalar, is sparse though zeros will not stay, or holds NaN or Inf.
        TypeError: it is traced.
    """
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            f"Leaf {path!r} of dtype {leaf.dtype} and shape {tuple(leaf.shape)} is selected, but only floats can share "
            "values; exclude it."
        )
    if isinstance(leaf, SparseArray) and not zero:
        raise ValueError(
            f"Leaf {path!r} is sparse: what it leaves out is 0 and needs `CodebookSpec(zero=True)`; materialize it if "
            "its zeros may go."
        )
    if not len(leaf.shape):
        raise ValueError(f"Leaf {path!r} is a scalar and has no axis along which to store codes; exclude it.")
    dense = jnp.asarray(plain(leaf))
    _check_on_host(f"Leaf {path!r}", dense)
    check_finite(path, dense)
    return dense


def checked_importance(path: str, leaf: Any, weight: Any) -> jax.Array | None:
    """The importance of a leaf, or None.

    Raises:
        ValueError: it does not broadcast against the leaf, is negative or not finite.
        TypeError: it is traced.
    """
    if weight is None or is_unselected(weight):
        return None
    try:
        fits = np.broadcast_shapes(weight.shape, leaf.shape) == tuple(leaf.shape)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"`importance` of leaf {path!r} has shape {tuple(weight.shape)}, which does not broadcast to "
            f"{tuple(leaf.shape)}."
        )
    _check_on_host(f"`importance` of leaf {path!r}", weight)
    if not bool((jnp.isfinite(weight) & (jnp.asarray(weight) >= 0)).all()):
        raise ValueError(f"`importance` of leaf {path!r} must be finite and at least 0.")
    return weight


def checked_table(path: str, table: jax.Array) -> jax.Array:
    """The trained table of a leaf; traced ones are not checked.

    Args:
        path: for messages.
        table: as it will be stored.

    Raises:
        ValueError: it holds NaN or Inf.
    """
    if not is_traced(table):
        # Inside `jit` a concrete table may still be at hand: it is checked there and then.
        with jax.ensure_compile_time_eval():
            bad = int((~jnp.isfinite(table)).sum())
        if bad:
            raise ValueError(
                f"The trained table of leaf {path!r} holds {bad} NaN or Inf among {table.size} values: training "
                "diverged; lower its learning rate."
            )
    return table


def weighed_errors(leaf: MatrixLeaf, stored: CompressedArray, importance: Shaped[Array, "..."]) -> list[float]:
    """sqrt(Σ h (w - w')² / Σ h w²) of each stack entry, in float64; 0 where nothing counts.

    Args:
        leaf: w.
        stored: w'.
        importance: h; broadcasts against the leaf.
    """
    spread = jnp.broadcast_to(importance, leaf.weight.shape)
    errors = []
    # On the host from here: entries cut from arrays of the device would be a program each.
    arrays = (np.asarray(leaf.rows(array), np.float64) for array in (leaf.weight, stored.materialize(), spread))
    for x, y, h in zip(*arrays, strict=True):
        total = float((h * x * x).sum())
        errors.append(float(np.sqrt((h * (x - y) ** 2).sum() / total)) if total else 0.0)
    return errors


def _check_on_host(what: str, value: Any) -> None:
    # Inside `jit` whatever is computed is traced, from values that are at hand as well.
    if is_traced(value) or is_traced(jnp.zeros(())):
        raise TypeError(
            f"{what} is met inside a traced function, but values to share are found on the host only; call this "
            "outside `jit`, `grad` and `vmap`."
        )
