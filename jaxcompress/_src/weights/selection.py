"""Which leaves a technique acts on: those asked for, and of a default those that it can take."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxcompress._src.trace.layout import LeafLayout, default_layout
from jaxcompress._src.trace.left_out import large_left_out, listed, warn_left_out
from jaxcompress._src.tree.maps import leaves_by_path, leaves_with_paths, map_with_path
from jaxcompress._src.tree.unselected import Unselected, map_selected
from jaxcompress._src.types import Params, Selector, is_compressed


class BlockError(ValueError):
    """Groups or tiles that do not divide the axes of a leaf."""


def selected_layouts(params: Params, *, select: Selector | None = None, layouts: Params | None = None) -> Params:
    """The layouts of the leaves to act on, `Unselected` elsewhere: what every technique starts from.

    A selection by `layouts` alone warns once, by a `LeftOutWarning`, of leaves above 1 % of the parameters that it
    leaves out although they may be weights: those of the kind "other", but for biases, norms and learned positions.

    Args:
        params: the tree.
        select: which leaves; by default every weight (contracted, looked up, or both: a tied table is one in all
            methods) when `layouts` are given, otherwise every array with at least two axes.
        layouts: from `layouts`; a leaf without known axes, and every leaf without `layouts`, gets `default_layout`.

    Returns:
        A partial tree of `LeafLayout`.

    Raises:
        ValueError: nothing is selected; says what is left out.

    Example:
        >>> import jax.numpy as jnp
        >>> selected_layouts({"bias": jnp.ones(4), "kernel": jnp.ones((3, 4))})["bias"]
        Unselected
    """
    known = map_with_path(lambda _, leaf: None, params) if layouts is None else layouts
    marks = map_with_path(lambda *_: None, params) if select is None else select(params)
    paths: list[str] = []

    def visit(path: str, leaf: Any, layout: LeafLayout | None, mark: bool | None) -> Any:
        if mark is None:
            mark = layout.is_weight if layout is not None else len(getattr(leaf, "shape", ())) >= 2
        if not mark:
            return Unselected
        paths.append(path)
        return layout if layout is not None and layout.is_weight else default_layout(path, leaf)

    selected = map_with_path(visit, params, known, marks, is_leaf=is_compressed)
    left_out = large_left_out(params, layouts) if select is None and layouts is not None else {}
    if not paths:
        known = f" Left out are {listed(left_out)}" if left_out else ""
        raise ValueError(
            f"No leaf of the tree has two axes or more (or is used as a weight): nothing is selected.{known}"
        )
    warn_left_out(left_out, "The default selection leaves out", advice=_ADVICE, stacklevel=3)
    return selected


def without_misfits(
    layouts: Params,
    params: Params,
    cut: Callable[[str, Sequence[int], LeafLayout], Any],
    select: Selector | None,
    *,
    advice: str = "Give `select` without them.",
) -> Params:
    """A selection without the leaves that cannot be cut into blocks, where they are there by default; see `misfits`.

    Args:
        layouts: from `selected_layouts`.
        params: the tree.
        cut: `(path, shape, layout)`; raises `BlockError` where the blocks do not divide a leaf.
        select: what the caller gave.
        advice: what to do about it.
    """
    leaves = leaves_by_path(params)
    places = {path: (leaves[path].shape, layout) for path, layout in leaves_with_paths(layouts)}
    rest = misfits(places, cut, select, advice=advice, stacklevel=5)
    return map_selected(lambda path, layout: Unselected if path in rest else layout, layouts)


def misfits(
    places: Mapping[str, tuple[Sequence[int], LeafLayout]],
    cut: Callable[[str, Sequence[int], LeafLayout], Any],
    select: Selector | None,
    *,
    advice: str = "Give `select` without them.",
    stacklevel: int = 4,
) -> frozenset[str]:
    """The paths of leaves that cannot be cut into blocks, where they are there by default; one warning names them.

    Args:
        places: path -> shape and layout of each leaf.
        cut: `(path, shape, layout)`; raises `BlockError` where the blocks do not divide a leaf.
        select: what the caller gave.
        advice: what to do about it.
        stacklevel: of the warning, counted from the caller.

    Raises:
        BlockError: leaves were asked for by `select`, or none can be cut; names them all.
    """
    errors: dict[str, BlockError] = {}
    for path, place in places.items():
        try:
            cut(path, *place)
        except BlockError as err:
            errors[path] = err
    if errors and (select is not None or len(errors) == len(places)):
        first = next(iter(errors.values()))
        for path in errors:
            first.add_note(f"at leaf {path!r}")
        raise first
    reasons = {path: str(err) for path, err in errors.items()}
    warn_left_out(reasons, "The default selection leaves out", advice=advice, stacklevel=stacklevel)
    return frozenset(errors)


_ADVICE = (
    "Name the leaves to act on by `select` (kernels of an unknown use count as (in..., out)); `trace.coverage` lists "
    "what the model does with each leaf."
)
