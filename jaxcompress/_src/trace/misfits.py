"""Leaves that a group size cannot divide: left out of a default selection, an error in one that was asked for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxcompress._src.trace.layout import LeafLayout
from jaxcompress._src.trace.left_out import warn_left_out
from jaxcompress._src.types import Selector


class BlockError(ValueError):
    """Groups or tiles that do not divide the axes of a leaf."""


def misfits(
    places: Mapping[str, tuple[Sequence[int], LeafLayout]],
    cut: Callable[[str, Sequence[int], LeafLayout], Any],
    select: Selector | None,
    *,
    advice: str = "Give `select` without them.",
) -> frozenset[str]:
    """The paths of leaves that cannot be cut into blocks, where they are there by default; one warning names them.

    Args:
        places: path -> shape and layout of each leaf.
        cut: `(path, shape, layout)`; raises `BlockError` where the blocks do not divide a leaf.
        select: what the caller gave.
        advice: what to do about it.

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
    warn_left_out(reasons, "The default selection leaves out", advice=advice, stacklevel=4)
    return frozenset(errors)
