"""A table of what a model does with each leaf, and whether a default selection takes it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from jaxcompress._src.trace.layout import LeafKind, LeafLayout
from jaxcompress._src.trace.layouts import layouts
from jaxcompress._src.trace.left_out import SHARE, is_doubtful
from jaxcompress._src.tree.maps import leaves_by_path, leaves_with_paths
from jaxcompress._src.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafCoverage:
    """One leaf of the table.

    Attributes:
        path: of the leaf.
        shape: of the leaf; empty for leaves that are no arrays.
        share: of the parameters of the tree, in [0, 1].
        kind: as in `LeafLayout`.
        selected: whether a default selection takes it.
        doubtful: it is left out although it may be a weight; above 1 % of the parameters a `LeftOutWarning` names it.
        reason: what the model does with it, in words.
    """

    path: str
    shape: tuple[int, ...]
    share: float
    kind: LeafKind
    selected: bool
    doubtful: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class Coverage:
    """All leaves; as a string, a table.

    Attributes:
        leaves: in the order of the tree.
    """

    leaves: tuple[LeafCoverage, ...]

    @property
    def share(self) -> float:
        """The share of the parameters that a default selection takes."""
        return sum(leaf.share for leaf in self.leaves if leaf.selected)

    @property
    def left_out(self) -> tuple[LeafCoverage, ...]:
        """The leaves that a default selection warns of."""
        return tuple(leaf for leaf in self.leaves if leaf.doubtful and leaf.share > SHARE)

    def __str__(self) -> str:
        rows = [("leaf", "shape", "share", "kind", "selected", "why")]
        for leaf in self.leaves:
            shape, mark = "x".join(map(str, leaf.shape)) or "-", "yes" if leaf.selected else "no"
            mark += " !" if leaf in self.left_out else ""
            rows.append((leaf.path, shape, f"{leaf.share:.1%}", leaf.kind, mark, leaf.reason))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)) for row in rows]
        notes = [f"A default selection takes {self.share:.1%} of the parameters."]
        if self.left_out:
            notes.append("! left out, but above 1 % of the parameters and neither bias nor norm: it may be a weight.")
        return "\n".join([line.rstrip() for line in lines] + notes)


def coverage(apply: Callable[..., Any], params: Params, *inputs: Any) -> Coverage:
    """What `apply` does with each leaf, and whether a default selection (`select=None` with `layouts`) takes it.

    Args:
        apply: `(params, *inputs) -> outputs`, pure.
        params: the tree; arrays, `jax.ShapeDtypeStruct` or compressed arrays.
        *inputs: as for `layouts`.

    Example:
        >>> import jax.numpy as jnp
        >>> def apply(params, x):
        ...     return x @ params["kernel"] @ jnp.tanh(params["squashed"]) + params["bias"][None]
        >>> params = {"bias": jnp.ones(4), "kernel": jnp.ones((3, 4)), "squashed": jnp.ones((4, 4))}
        >>> print(coverage(apply, params, jnp.ones((5, 3))))
        leaf      shape  share  kind    selected  why
        bias      4      12.5%  other   no        it goes into `add`, spread over the activations
        kernel    3x4    37.5%  matmul  yes       it is contracted over axis 0
        squashed  4x4    50.0%  other   no !      it goes into `tanh`
        A default selection takes 37.5% of the parameters.
        ! left out, but above 1 % of the parameters and neither bias nor norm: it may be a weight.
    """
    leaves, leaf_layouts = leaves_with_paths(params), leaves_by_path(layouts(apply, params, *inputs))
    sizes = [math.prod(leaf.shape) if hasattr(leaf, "shape") else 0 for _, leaf in leaves]
    return Coverage(
        tuple(
            LeafCoverage(
                path=path,
                shape=tuple(getattr(leaf, "shape", ())),
                share=size / max(sum(sizes), 1),
                kind=leaf_layouts[path].kind,
                selected=leaf_layouts[path].is_weight,
                doubtful=is_doubtful(leaf, leaf_layouts[path]),
                reason=_reason(leaf_layouts[path]),
            )
            for (path, leaf), size in zip(leaves, sizes, strict=True)
        )
    )


def _reason(layout: LeafLayout) -> str:
    if layout.kind == "unused":
        return "no output depends on it"
    if not layout.is_weight:
        return f"{layout.reason}, spread over the activations" if layout.spread else layout.reason
    contracted = f"it is contracted over {_axes(layout.input_axes)}"
    known = {
        "matmul": contracted,
        "conv": f"a convolution contracts {_axes(layout.input_axes)}",
        "lookup": f"its rows, along {_axes(layout.output_axes)}, are looked up",
        "tied": f"its rows are looked up, and {contracted}",
    }[layout.kind]
    return f"{known}, for each entry of {_axes(layout.stack_axes)}" if layout.stack_axes else known


def _axes(axes: tuple[int, ...]) -> str:
    return f"axis {axes[0]}" if len(axes) == 1 else f"axes {axes}"
