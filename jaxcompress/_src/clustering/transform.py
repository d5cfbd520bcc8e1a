"""Trained tables as a transform: gradients are grouped by code."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxcompress._src.arrays.codebook import look_up
from jaxcompress._src.arrays.sparse import SparseArray, sparsify
from jaxcompress._src.clustering.cluster import store_codes
from jaxcompress._src.clustering.fit import fit_tables, nearest_codes
from jaxcompress._src.clustering.leaves import checked_importance, checked_leaf, checked_table, clusterable
from jaxcompress._src.clustering.spec import CodebookSpec
from jaxcompress._src.meshes import gathered, on_whole_mesh, transform_on_auto_axes
from jaxcompress._src.schedules import warn_unfinished
from jaxcompress._src.transforms import identity
from jaxcompress._src.tree.checks import is_traced
from jaxcompress._src.tree.maps import map_with_path
from jaxcompress._src.tree.unselected import Unselected, is_unselected, map_selected, without_compressed
from jaxcompress._src.types import Params, Selector, Transform, TransformState, exportable, plain


@exportable
class CodebookState(NamedTuple):
    """Fixed state of `trained_codebooks`.

    Attributes:
        codes: partial tree of uint8, in the shapes of the leaves.
        importance: partial tree, broadcast against them; `Unselected` where it is 1.
        step: int32, number of updates so far.
    """

    codes: Params
    importance: Params
    step: jax.Array


@transform_on_auto_axes
def trained_codebooks(
    spec: CodebookSpec,
    *,
    every: int = 1,
    until: int = 0,
    importance: Params | None = None,
    store: Literal["dense", "sparse"] = "dense",
    select: Selector | None = None,
    layouts: Params | None = None,
) -> Transform:
    """Trains with weights that share values. Tables start from `cluster` and are trained; gradients are summed by code.

    Up to `until`, weights are trained too (straight-through), and every few updates go to the value that is nearest or,
    with `spec.rate`, cheapest; from then on codes stand still, and only tables are trained. Stands behind a pruning
    transform: with `spec.zero`, what is 0 stays 0, as no gradient passes here to weights that are exactly 0.

    Args:
        spec: how many values, which weights share a table, and what a code costs.
        every: updates between assignments; they happen when step % every == 0, the first update being step 0, and in
            any case at the last update before `until`.
        until: the first update from which codes stand still. 0: they are those of the start. If training ended before,
            weights may have moved since they got their codes: `finalize` keeps those, as `apply` does, and warns
            (`UnfinishedScheduleWarning`).
        importance: a partial tree of positive weights of the squared errors, such as `input_importance` gives.
        store: what `finalize` does with codes of 0: keeps them ("dense", smaller in the file and at low sparsity in
            memory) or leaves them out under a bit mask ("sparse").
        select: which leaves; by default every weight. Those that are compressed when the training begins stay as they
            are (of sparse ones, the values that are there get codes).
        layouts: from `trace.layouts`.

    Returns:
        The transform. Its trainable state is the partial tree of tables (float32), its fixed state a `CodebookState`.

    Raises:
        ValueError: `every` below 1, `until` negative, unknown `store`; from `init`: as `cluster`; from `finalize`: a
            table that holds NaN or Inf. Names the leaf.
        TypeError: from `init`: inside `jit`, as `cluster`.

    Example:
        >>> import jax
        >>> params = {"kernel": jnp.array([[0.0, 1.0], [1.2, -2.0]])}
        >>> transform = trained_codebooks(CodebookSpec(values=3))
        >>> state = transform.init(params, key=jax.random.key(0))
        >>> transform.apply(params, state)["kernel"]
        Array([[ 0. ,  1.1],
               [ 1.1, -2. ]], dtype=float32)

    References:
        Han, Mao and Dally 2016, "Deep Compression", section 3; Wiedemann et al. 2020, "Entropy-constrained training of
        deep neural networks".
    """
    if every < 1 or until < 0:
        raise ValueError(f"`every` must be at least 1 and `until` not negative, got {every} and {until}.")
    if store not in ("dense", "sparse") or (store == "sparse" and not spec.zero):
        raise ValueError(f"`store` must be 'dense', or 'sparse' if the spec has `zero`; got {store!r}.")
    layouts_of = functools.partial(clusterable, spec=spec, select=select, layouts=layouts)
    return identity()._replace(
        init=functools.partial(_init, spec, importance, layouts_of),
        apply=functools.partial(_apply, spec, until),
        update=functools.partial(_update, spec, every, until),
        finalize=functools.partial(_finalize, spec, store, until, layouts_of),
    )


def _init(spec: CodebookSpec, importance: Params | None, layouts_of: Any, params: Params, *, key: Any, statistics=None):
    del key, statistics
    layouts = without_compressed(layouts_of(params), params, but=(SparseArray,))
    known = map_with_path(lambda *_: Unselected, params) if importance is None else importance
    h = map_selected(
        lambda path, _, leaf, weight: Unselected if (h := checked_importance(path, leaf, weight)) is None else h,
        layouts,
        params,
        known,
    )

    def fit(path: str, layout: Any, leaf: Any, weight: Any) -> Array:
        dense = checked_leaf(path, leaf, zero=spec.zero)
        blocks = spec.blocks(dense.shape, layout)
        table = fit_tables(gathered(dense), spec, blocks, gathered(_given(weight))).astype(jnp.float32)
        return on_whole_mesh(table, leaf)

    tables = map_selected(fit, layouts, params, h)
    codes = _assign(spec, tables, params, h)
    return TransformState(tables, CodebookState(codes, h, jnp.zeros((), jnp.int32)))


def _apply(spec: CodebookSpec, until: int, params: Params, state: TransformState, *, key: Any = None) -> Params:
    del key

    def visit(_: str, table: Any, codes: Any, leaf: Any) -> Any:
        if is_unselected(table):
            return leaf
        weights = plain(leaf)
        value = look_up(_with_zeros(codes, weights, spec), _rounded(table, spec), zero=spec.zero, dtype=weights.dtype)
        return _straight_through(value, _movable(weights, spec)) if until else value

    return map_with_path(visit, state.trainable, state.fixed.codes, params, is_leaf=is_unselected)


def _update(
    spec: CodebookSpec,
    every: int,
    until: int,
    grads: Any,
    state: TransformState,
    params: Params,
    *,
    key: Any,
    loss: Any,
) -> tuple[TransformState, None]:
    del grads, key, loss
    fixed = state.fixed
    codes = fixed.codes
    if until:
        # What weights have learned since the last assignment would be lost without one at the very end.
        due = ((fixed.step % every == 0) | (fixed.step == until - 1)) & (fixed.step < until)
        assign = functools.partial(_assign, spec, state.trainable, params)
        codes = jax.lax.cond(due, assign, lambda _: fixed.codes, fixed.importance)
    return TransformState(state.trainable, CodebookState(codes, fixed.importance, fixed.step + 1)), None


def _finalize(
    spec: CodebookSpec, store: str, until: int, layouts_of: Any, params: Params, state: TransformState
) -> Params:
    layouts, step = layouts_of(params), state.fixed.step
    if not is_traced(step) and 0 < int(step) < until:
        warn_unfinished(
            f"Training ended after {int(step)} updates; weights were to move, and to be assigned to values, for "
            f"{until}. What they have learned since the last assignment is not in their codes."
        )

    def visit(path: str, table: Any, codes: Any, layout: Any, leaf: Any) -> Any:
        if is_unselected(table):
            return leaf
        values = checked_table(path, _rounded(table, spec))
        weights = plain(leaf)
        codes = _with_zeros(codes, weights, spec)
        like = leaf
        if store == "sparse":
            stack = [axis for at, axis in enumerate(layout.stack_axes) if at == axis]
            like = sparsify(weights, codes != 0, stack_ndim=len(stack))
        return store_codes(codes, values, spec, layout, like)

    return map_with_path(visit, state.trainable, state.fixed.codes, layouts, params, is_leaf=is_unselected)


def _assign(spec: CodebookSpec, tables: Params, params: Params, importance: Params) -> Params:
    return map_selected(
        lambda _, table, leaf, weight: nearest_codes(plain(leaf), _rounded(table, spec), spec, _given(weight)),
        tables,
        params,
        importance,
    )


def _with_zeros(codes: UInt8[Array, "..."], weights: Float[Array, "..."], spec: CodebookSpec) -> UInt8[Array, "..."]:
    """An earlier stage may have pruned a weight since it got its code."""
    return jnp.where(weights == 0, jnp.uint8(0), codes) if spec.zero else codes


def _movable(weights: Float[Array, "..."], spec: CodebookSpec) -> Float[Array, "..."]:
    """The weights, with no gradient where they are 0: pruned ones would move, and get another code."""
    return jnp.where(weights == 0, jnp.zeros((), weights.dtype), weights) if spec.zero else weights


def _rounded(table: Float[Array, "..."], spec: CodebookSpec) -> Float[Array, "..."]:
    """What is stored; gradients pass as if it were not rounded."""
    return table.astype(spec.dtype)


@jax.custom_vjp
def _straight_through(value: Float[Array, "..."], weights: Float[Array, "..."]) -> Float[Array, "..."]:
    """`value`, whose gradient goes to `weights` as well."""
    del weights
    return value


_straight_through.defvjp(
    lambda value, weights: (_straight_through(value, weights), None), lambda _, gradient: (gradient, gradient)
)


def _given(importance: Any) -> Any:
    return None if is_unselected(importance) else importance
