"""Leaves as matrices (stack, inputs, outputs), next to the statistics of their inputs.

Shape letters: S stack entries, D inputs, R outputs. Of a grouped convolution each group is a stack entry of its own:
S runs over (stack, group), R over the outputs of one group.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from jaxcompress._src.calibration.statistics import InputStatistics
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.trace.layout import LeafLayout, default_layout
from jaxcompress._src.tree.checks import check_finite, is_traced
from jaxcompress._src.tree.maps import leaves_with_paths, map_with_path
from jaxcompress._src.tree.unselected import Unselected, is_unselected, map_selected
from jaxcompress._src.types import Params, Selector, is_compressed
from jaxcompress._src.weights.selection import selected_layouts
from jaxcompress._src.weights.unseen import unseen_inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixLeaf:
    """A leaf that can be read as matrices.

    Attributes:
        path: of the leaf.
        weight: plain floats, in the leaf's shape.
        layout: its axes.
    """

    path: str
    weight: jax.Array
    layout: LeafLayout

    @property
    def stack(self) -> int:
        """Number of stack entries, those of groups included."""
        return math.prod(self.stack_shape)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Of its statistics: the sizes of the stack axes, and the number of groups if there are several."""
        sizes = tuple(self.weight.shape[axis] for axis in self.layout.stack_axes)
        return sizes if self.layout.groups == 1 else (*sizes, self.layout.groups)

    @on_auto_axes
    def matrix(self, leaf: Shaped[Array, "..."]) -> Shaped[Array, "S D R"]:
        """An array of the leaf's shape, as one matrix for each stack entry."""
        stack, inputs, outputs = self._sizes
        groups = self.layout.groups
        wide = leaf.transpose(self._permutation).reshape(stack, inputs, groups, outputs // groups)
        return jnp.moveaxis(wide, 2, 1).reshape(stack * groups, inputs, outputs // groups)

    @on_auto_axes
    def leaf(self, matrix: Shaped[Array, "S D R"]) -> Shaped[Array, "..."]:
        """The inverse of `matrix`."""
        shape = [self.weight.shape[axis] for axis in self._permutation]
        return self.ungrouped(matrix).reshape(shape).transpose(np.argsort(self._permutation).tolist())

    def ungrouped(self, matrix: Shaped[Array, "S D r"]) -> Shaped[Array, "s D R"]:
        """Matrices of the groups beside each other: the outputs of all groups along one axis."""
        if self.layout.groups == 1:
            return matrix
        parts = matrix.reshape(-1, self.layout.groups, *matrix.shape[1:])
        return jnp.moveaxis(parts, 1, 2).reshape(parts.shape[0], matrix.shape[1], -1)

    @on_auto_axes
    def rows(self, leaf: Shaped[Array, "..."]) -> Shaped[Array, "s N"]:
        """An array of the leaf's shape, as one row for each stack entry: groups do not count as such."""
        stack, inputs, outputs = self._sizes
        return leaf.transpose(self._permutation).reshape(stack, inputs * outputs)

    @on_auto_axes
    def of_inputs(self, values: Float[Array, "*stack D"]) -> Float[Array, "..."]:
        """One value for each input, in a shape that broadcasts against the leaf."""
        layout = self.layout
        if layout.groups > 1:
            _, inputs, outputs = self._sizes
            own = values.reshape(self.stack, inputs, 1)
            return self.leaf(jnp.broadcast_to(own, (self.stack, inputs, outputs // layout.groups)))
        shape = [self.weight.shape[axis] for axis in (*layout.stack_axes, *layout.input_axes)]
        spread = values.reshape(*shape, *(1,) * len(layout.output_axes))
        return spread.transpose(np.argsort(self._permutation).tolist())

    @on_auto_axes
    def flat(self, statistic: Shaped[Array, "..."], *, ndim: int) -> Shaped[Array, "..."]:
        """A statistic with `ndim` axes of its own, with one axis for the stack."""
        return statistic.reshape(self.stack, *statistic.shape[statistic.ndim - ndim :])

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Of the stack axes, inputs and outputs, all groups together."""
        axes = (self.layout.stack_axes, self.layout.input_axes, self.layout.output_axes)
        stack, inputs, outputs = (math.prod(self.weight.shape[axis] for axis in own) for own in axes)
        return stack, inputs, outputs

    @property
    def _permutation(self) -> tuple[int, ...]:
        return (*self.layout.stack_axes, *self.layout.input_axes, *self.layout.output_axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrated(MatrixLeaf):
    """The same, with statistics.

    Attributes:
        statistics: of its inputs.
    """

    statistics: InputStatistics

    @property
    def unseen(self) -> Bool[Array, "S D"]:
        """Which inputs are 0 in every row."""
        return self.flat(unseen_inputs(self.statistics), ndim=1)


def matrices(params: Params, *, select: Selector | None = None, layouts: Params | None = None) -> Params:
    """The leaves to compress as `MatrixLeaf`, `Unselected` elsewhere.

    Args:
        params: the tree.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`; by default kernels are (in..., out).

    Raises:
        ValueError: nothing is selected; a selected leaf is no float array, or holds NaN or Inf. Names the leaf.
    """

    def visit(path: str, layout: LeafLayout, leaf: Any) -> MatrixLeaf:
        # Without statistics the inputs of groups need not be told apart.
        return MatrixLeaf(path=path, weight=checked_weight(path, leaf), layout=dataclasses.replace(layout, groups=1))

    return map_selected(visit, selected_layouts(params, select=select, layouts=layouts), params)


def calibrated(
    params: Params, statistics: Params, *, needs: str, select: Selector | None, layouts: Params | None
) -> Params:
    """The leaves to compress with their statistics, `Unselected` elsewhere.

    Args:
        params: the tree.
        statistics: from `calibration.input_statistics`.
        needs: the statistic that must be there.
        select: which leaves; by default all that have `InputStatistics`.
        layouts: from `trace.layouts`; by default kernels are (in..., out).

    Raises:
        ValueError: a leaf without statistics, or with statistics of another width; nothing to compress. Names the leaf.
    """
    known = map_with_path(lambda *_: None, params) if layouts is None else layouts
    marks = map_with_path(lambda *_: None, params) if select is None else select(params)

    def visit(path: str, leaf: Any, found: Any, layout: LeafLayout | None, mark: bool | None) -> Any:
        has = isinstance(found, InputStatistics) and getattr(found, needs) is not None
        if mark and not has:
            raise ValueError(f"Leaf {path!r} has no statistic {needs!r}; gather it with `input_statistics`.")
        if not has or mark is False:
            return Unselected
        axes = layout if layout is not None and layout.is_weight else default_layout(path, leaf)
        entry = Calibrated(path=path, weight=checked_weight(path, leaf), layout=axes, statistics=found)
        _check_width(entry, needs)
        return entry

    chosen = map_with_path(visit, params, statistics, known, marks)
    if not list(entries(chosen)):
        raise ValueError(f"No leaf has the statistic {needs!r}: there is nothing to compress.")
    return chosen


def entries(chosen: Params) -> Iterator[Any]:
    """The leaves that are there."""
    for _, entry in leaves_with_paths(chosen):
        yield entry


def map_entries(fn: Callable[[Any], Any], chosen: Params) -> Params:
    """`fn` of every leaf that is there; errors name the leaf."""
    return map_selected(lambda _, entry: fn(entry), chosen)


def with_leaves(params: Params, chosen: Params, leaves: dict[str, Any]) -> Params:
    """`params` with new arrays for the chosen leaves, by path."""

    def put(path: str, leaf: Any, entry: Any) -> Any:
        return leaf if is_unselected(entry) else leaves[path]

    return map_with_path(put, params, chosen, is_leaf=is_compressed)


def checked_weight(path: str, leaf: Any) -> jax.Array:
    """A leaf as floats; errors name it."""
    plain = leaf.materialize() if is_compressed(leaf) else jnp.asarray(leaf)
    if not jnp.issubdtype(plain.dtype, jnp.floating):
        raise ValueError(f"Leaf {path!r} holds {plain.dtype}: only floats can be compressed; exclude it.")
    check_finite(path, plain)
    return plain


def checked_fisher(fisher: Params, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    """The Fisher information of some leaves, by path; errors name the leaf.

    Args:
        fisher: from `fisher`.
        shapes: path -> shape of the leaf.

    Raises:
        ValueError: a leaf without information, or with one of another shape, or that is negative, NaN or Inf somewhere.
    """
    given = dict(leaves_with_paths(fisher, is_leaf=lambda leaf: is_unselected(leaf) or is_compressed(leaf)))
    found = {}
    for path, shape in shapes.items():
        own = given.get(path)
        if own is None or is_unselected(own) or is_compressed(own) or tuple(own.shape) != tuple(shape):
            raise ValueError(f"Leaf {path!r} needs an entry in `fisher` of its shape, {tuple(shape)}.")
        if not bool(jnp.isfinite(own).all()):
            raise ValueError(f"The `fisher` of leaf {path!r} holds NaN or Inf.")
        if bool((own < 0).any()):
            raise ValueError(f"`fisher` of leaf {path!r} is negative somewhere.")
        found[path] = own
    return found


def _check_width(entry: Calibrated, needs: str) -> None:
    layout, shape, found = entry.layout, entry.weight.shape, entry.statistics
    wanted = list(entry.stack_shape), math.prod(shape[axis] for axis in layout.input_axes)
    given = list(found.count.shape), getattr(found, needs).shape[-1]
    if wanted != given:
        raise ValueError(
            f"Leaf {entry.path!r} of shape {shape} has stack {wanted[0]} and {wanted[1]} inputs, its statistics have "
            f"{given[0]} and {given[1]}; give `layouts` from `trace.layouts`."
        )
    # A stack entry without rows is an expert that nothing reached: methods know what to do. A whole leaf is a mistake.
    if not is_traced(found.count) and not bool((found.count > 0).any()):
        raise ValueError(f"The statistics of leaf {entry.path!r} are of no rows.")
    for part in jax.tree.leaves(found):
        if not is_traced(part) and not bool(jnp.isfinite(part).all()):
            raise ValueError(f"The statistics of leaf {entry.path!r} hold NaN or Inf.")
