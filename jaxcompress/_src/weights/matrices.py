"""Leaves as matrices (stack, inputs, outputs), next to what is known of their inputs.

Shape letters: S stack entries, D inputs, R outputs. Of a grouped convolution each group is a stack entry of its own:
S runs over (stack, group), R over the outputs of one group.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Shaped

from jaxcompress._src.calibration.statistics import InputStatistics, LookupCounts
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.trace.layout import LeafLayout, default_layout
from jaxcompress._src.tree.checks import all_finite, check_finite, is_traced
from jaxcompress._src.tree.maps import leaves_by_path, map_with_path
from jaxcompress._src.tree.unselected import is_unselected
from jaxcompress._src.types import Params, Selector, is_compressed, plain
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

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of stack entries, inputs and outputs, all groups together."""
        axes = (self.layout.stack_axes, self.layout.input_axes, self.layout.output_axes)
        stack, inputs, outputs = (math.prod(self.weight.shape[axis] for axis in along) for along in axes)
        return stack, inputs, outputs

    @property
    def matrices(self) -> Float32[Array, "S D R"]:
        """The weights, in float32."""
        return self.matrix(self.weight).astype(jnp.float32)

    @on_auto_axes
    def matrix(self, leaf: Shaped[Array, "..."]) -> Shaped[Array, "S D R"]:
        """An array of the leaf's shape, as one matrix for each stack entry."""
        stack, inputs, outputs = self.sizes
        groups = self.layout.groups
        if groups == 1:
            return leaf.transpose(self._permutation).reshape(stack, inputs, outputs)
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
        stack, inputs, outputs = self.sizes
        return leaf.transpose(self._permutation).reshape(stack, inputs * outputs)

    @on_auto_axes
    def of_inputs(self, values: Float[Array, "*stack D"]) -> Float[Array, "..."]:
        """One value for each input, in a shape that broadcasts against the leaf."""
        layout = self.layout
        if layout.groups > 1:
            _, inputs, outputs = self.sizes
            spread = values.reshape(self.stack, inputs, 1)
            return self.leaf(jnp.broadcast_to(spread, (self.stack, inputs, outputs // layout.groups)))
        shape = [self.weight.shape[axis] for axis in (*layout.stack_axes, *layout.input_axes)]
        spread = values.reshape(*shape, *(1,) * len(layout.output_axes))
        return spread.transpose(np.argsort(self._permutation).tolist())

    @on_auto_axes
    def flat(self, statistic: Shaped[Array, "..."], *, ndim: int) -> Shaped[Array, "..."]:
        """A statistic with `ndim` axes of its own, with one axis for the stack."""
        return statistic.reshape(self.stack, *statistic.shape[statistic.ndim - ndim :])

    @property
    def _permutation(self) -> tuple[int, ...]:
        return (*self.layout.stack_axes, *self.layout.input_axes, *self.layout.output_axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibratedLeaf(MatrixLeaf):
    """A leaf that is contracted, with the statistics of its inputs."""

    statistics: InputStatistics

    @property
    def gram(self) -> Float32[Array, "S D D"]:
        """XᵀX."""
        return self.flat(self.statistics.gram, ndim=2)

    @property
    def cross(self) -> Float32[Array, "S D D"] | None:
        """YᵀX, with Y the inputs in the dense model; None where they are not known."""
        return None if self.statistics.cross is None else self.flat(self.statistics.cross, ndim=2)

    @property
    def count(self) -> Float32[Array, " S"]:
        """Number of rows."""
        return self.statistics.count.reshape(-1)

    @property
    def unseen(self) -> Bool[Array, "S D"]:
        """Which inputs are 0 in every row."""
        return self.flat(unseen_inputs(self.statistics), ndim=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableLeaf(MatrixLeaf):
    """A table that is looked up, with how often each row was; as a matrix, its rows are the outputs."""

    counts: LookupCounts


EvidentLeaf = CalibratedLeaf | TableLeaf
"""A leaf with what is known of its inputs."""


def weight_leaves(params: Params, *, select: Selector | None = None, layouts: Params | None = None) -> list[MatrixLeaf]:
    """The leaves to compress without statistics.

    Args:
        params: the tree.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`; by default kernels are (in..., out).

    Raises:
        ValueError: nothing is selected; a selected leaf is no float array, or holds NaN or Inf. Names the leaf.
    """
    leaves: list[MatrixLeaf] = []

    def visit(path: str, leaf: Any, layout: Any) -> None:
        if not is_unselected(layout):
            # Without statistics the inputs of groups need not be told apart.
            axes = dataclasses.replace(layout, groups=1)
            leaves.append(MatrixLeaf(path=path, weight=checked_weight(path, leaf), layout=axes))

    map_with_path(visit, params, selected_layouts(params, select=select, layouts=layouts))
    return leaves


def calibrated_leaves(
    params: Params, statistics: Params, *, needs: str, select: Selector | None, layouts: Params | None
) -> list[CalibratedLeaf]:
    """The leaves to compress with the statistics of their inputs.

    Args:
        params: the tree.
        statistics: from `calibration.input_statistics`.
        needs: the statistic that must be there.
        select: which leaves; by default all that have it.
        layouts: from `trace.layouts`; by default kernels are (in..., out).

    Raises:
        ValueError: a selected leaf without the statistic; a leaf with statistics of another width, of no rows, or with
            NaN or Inf in either; nothing to compress. Names the leaf.
    """
    leaves = _evident_leaves(params, statistics, needs, select, layouts, tables=False)
    return [leaf for leaf in leaves if isinstance(leaf, CalibratedLeaf)]


def calibrated_leaves_and_tables(
    params: Params, statistics: Params, *, needs: str, select: Selector | None, layouts: Params | None
) -> list[EvidentLeaf]:
    """The leaves to compress: contracted ones with their statistics, and tables with their counts.

    Args:
        params: the tree.
        statistics: from `calibration.input_statistics`.
        needs: the statistic that contracted leaves must have.
        select: which leaves; by default all that have either.
        layouts: from `trace.layouts`; by default kernels are (in..., out), embeddings (rows, features).

    Raises:
        ValueError: as `calibrated_leaves`; a table whose counts are those of another one.
    """
    return _evident_leaves(params, statistics, needs, select, layouts, tables=True)


def checked_weight(path: str, leaf: Any) -> jax.Array:
    """A leaf as floats; errors name it."""
    weight = jnp.asarray(plain(leaf))
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(f"Leaf {path!r} holds {weight.dtype}: only floats can be compressed; exclude it.")
    check_finite(path, weight)
    return weight


def checked_fisher(fisher: Params, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    """The Fisher information of some leaves, by path; errors name the leaf.

    Args:
        fisher: from `fisher`.
        shapes: path -> shape of the leaf.

    Raises:
        ValueError: a leaf without information, or with one of another shape, or that is negative, NaN or Inf somewhere.
    """
    given, checked = leaves_by_path(fisher), {}
    for path, shape in shapes.items():
        information = given.get(path)
        if information is None or is_compressed(information) or tuple(information.shape) != tuple(shape):
            raise ValueError(f"Leaf {path!r} needs an entry in `fisher` of its shape, {tuple(shape)}.")
        if not all_finite(information):
            raise ValueError(f"The `fisher` of leaf {path!r} holds NaN or Inf.")
        if bool((information < 0).any()):
            raise ValueError(f"`fisher` of leaf {path!r} is negative somewhere.")
        checked[path] = information
    return checked


def _evident_leaves(
    params: Params, statistics: Params, needs: str, select: Selector | None, layouts: Params | None, *, tables: bool
) -> list[EvidentLeaf]:
    known = map_with_path(lambda *_: None, params) if layouts is None else layouts
    marks = map_with_path(lambda *_: None, params) if select is None else select(params)
    leaves, lacking = list[EvidentLeaf](), list[str]()

    def visit(path: str, leaf: Any, evidence: Any, layout: LeafLayout | None, mark: bool | None) -> None:
        if mark is False:
            return
        axes = layout if layout is not None and layout.is_weight else default_layout(path, leaf)
        if tables and isinstance(evidence, LookupCounts):
            leaves.append(TableLeaf(path=path, weight=checked_weight(path, leaf), layout=axes, counts=evidence))
            _check_rows(leaves[-1], evidence)
        elif isinstance(evidence, InputStatistics) and getattr(evidence, needs) is not None:
            leaves.append(
                CalibratedLeaf(path=path, weight=checked_weight(path, leaf), layout=axes, statistics=evidence)
            )
            _check_statistics(leaves[-1], evidence, needs)
        elif mark:
            raise ValueError(f"Leaf {path!r} has no statistic {needs!r}; gather it with `input_statistics`.")
        elif isinstance(evidence, InputStatistics):
            lacking.append(path)

    map_with_path(visit, params, statistics, known, marks)
    # Tables alone are an answer where nothing is contracted, not where all that is has other statistics.
    if not leaves or (lacking and all(isinstance(leaf, TableLeaf) for leaf in leaves)):
        raise ValueError(f"No leaf has the statistic {needs!r}: there is nothing to compress.")
    return leaves


def _check_statistics(entry: MatrixLeaf, statistics: InputStatistics, needs: str) -> None:
    wanted = list(entry.stack_shape), entry.sizes[1]
    given = list(statistics.count.shape), getattr(statistics, needs).shape[-1]
    if wanted != given:
        raise ValueError(
            f"Leaf {entry.path!r} of shape {entry.weight.shape} has stack {wanted[0]} and {wanted[1]} inputs, its "
            f"statistics have {given[0]} and {given[1]}; give `layouts` from `trace.layouts`."
        )
    # A stack entry without rows is an expert that nothing reached: methods know what to do. A whole leaf is a mistake.
    if not is_traced(statistics.count) and not bool((statistics.count > 0).any()):
        raise ValueError(f"The statistics of leaf {entry.path!r} are of no rows.")
    for part in jax.tree.leaves(statistics):
        if not is_traced(part) and not all_finite(part):
            raise ValueError(f"The statistics of leaf {entry.path!r} hold NaN or Inf.")


def _check_rows(table: MatrixLeaf, counts: LookupCounts) -> None:
    stack, _, rows = table.sizes
    if rows != counts.rows.size or stack != 1:
        raise ValueError(
            f"Leaf {table.path!r} of shape {table.weight.shape} has {rows} rows, its statistics count "
            f"{counts.rows.size}; give `layouts` from `trace.layouts`."
        )
