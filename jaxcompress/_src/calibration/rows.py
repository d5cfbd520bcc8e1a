"""The rows that a contraction multiplies by a leaf, as one matrix, and the weights of those rows."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Shaped

from jaxcompress._src.calibration.factors import Multiples, Scale, multiples_of, scales_of
from jaxcompress._src.trace.contraction import Roles, entries, roles
from jaxcompress._src.trace.layout import LeafLayout
from jaxcompress._src.trace.origin import Origin


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Rows:
    """How to bring the other operand of a contraction into (stack..., rows, features).

    Attributes:
        permutation: of its axes: stack axes, rows, features.
        stack_shape: sizes of the stack axes.
        row_shape: of the rows, before they are flattened.
        width: number of features of the leaf.
        features: for each column the feature that it is multiplied by, flattened in the order of the leaf; -1 where it
            is multiplied by something else. None: one after another.
        entries: for each entry of the flattened stack axes that of the leaf, but for what moves; -1 for none.
        moving: (distance between stack entries, number of steps) of what loops add to the stack entry.
        when: traced conditions under which all this happens.
        outputs: which of the leaf's outputs it makes; None: all.
        scales: what multiplies the operand.
        multiples: of the rows that the outputs meet, where the model multiplies or repeats them; None: the rows.
        visits: of a stack with one axis: its entry in each iteration of the loops over it, with one axis for each loop;
            below 0 for none. None: no loop chooses the entry in a way that is known before it runs.
        sizes: of a ragged matmul: how many of the rows, one after another, each of `entries` gets; None: all of them.
    """

    permutation: tuple[int, ...]
    stack_shape: tuple[int, ...]
    row_shape: tuple[int, ...]
    width: int
    features: Int[np.ndarray, " F"] | None
    entries: Int[np.ndarray, " M"]
    moving: tuple[tuple[int, Any], ...]
    when: tuple[Any, ...]
    outputs: Bool[np.ndarray, " R"] | None
    scales: tuple[Scale, ...]
    multiples: Multiples | None = None
    visits: Int[np.ndarray, "..."] | None = None
    sizes: Any = None

    @property
    def offset(self) -> Any:
        """What loops add to the stack entry."""
        return sum(stride * steps for stride, steps in self.moving)

    @property
    def inputs(self) -> Bool[np.ndarray, " D"]:
        """Which of the leaf's inputs it runs over."""
        covered = np.ones(self.width, bool)
        if self.features is not None:
            covered[:] = False
            covered[self.features[self.features >= 0]] = True
        return covered

    @property
    def signature(self) -> Any:
        """Equal where the same input gives the same matrix, and None where that is not known."""
        if self.scales or self.when:
            return None
        features = None if self.features is None else self.features.tobytes()
        moving = tuple((stride, Same(steps)) for stride, steps in self.moving)
        return (
            self.permutation,
            self.stack_shape,
            self.row_shape,
            self.width,
            features,
            self.entries.tobytes(),
            moving,
            Same(self.sizes),
        )

    def matrix(self, x: Shaped[Array, "..."], factors: Sequence[Any] = (), stream: int = 0) -> Shaped[Array, "..."]:
        """The rows as one matrix for each stack entry; `factors` are the arrays of the scales."""
        for scale, arrays in zip(self.scales, factors, strict=True):
            x = x * scale.beside(arrays[stream % len(arrays)], x.ndim)
        rows = x.transpose(self.permutation).reshape(*self.stack_shape, math.prod(self.row_shape), -1)
        if self.features is None:
            return rows
        if len(self.features) == self.width and np.array_equal(np.sort(self.features), np.arange(self.width)):
            return rows[..., np.argsort(self.features)]
        # What meets a feature twice adds up.
        places = np.where(self.features < 0, self.width, self.features)
        return jnp.zeros((*rows.shape[:-1], self.width), rows.dtype).at[..., places].add(rows, mode="drop")


@dataclasses.dataclass(frozen=True, eq=False)
class Same:
    """Something that is equal to itself only: a traced number, or an array."""

    it: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and (other.it is self.it or _is_same_number(self.it, other.it))

    def __hash__(self) -> int:
        return 0 if isinstance(self.it, int) else id(self.it)


def _is_same_number(one: Any, two: Any) -> bool:
    return isinstance(one, int) and isinstance(two, int) and one == two


def rows_of_dot(
    parameters: Mapping[str, Any], side: int, shape: Sequence[int], origin: Origin, layout: LeafLayout
) -> Rows:
    """The rows of a `dot_general`.

    Args:
        parameters: of the equation.
        side: which operand is the leaf.
        shape: of the other operand.
        origin: of the leaf's operand.
        layout: of the leaf.

    Raises:
        ValueError: the contraction is not over input axes, or its batch axes are no stack axes.
    """
    contracted, batch = parameters["dimension_numbers"]
    summed = list(zip(contracted[side], contracted[1 - side], strict=True))
    batched = list(zip(batch[side], batch[1 - side], strict=True))
    return _rows(origin, layout, shape, summed, batched)


def rows_of_conv(
    parameters: Mapping[str, Any], x: Any, kernel: Sequence[int], origin: Origin, layout: LeafLayout
) -> tuple[Shaped[Array, "..."], Rows]:
    """The patches that a convolution multiplies by its kernel, and how to flatten them.

    The groups of a grouped convolution come as the last stack axis.

    Raises:
        ValueError: the leaf has other groups elsewhere, or its outputs are not in the order of the groups; the batch is
            grouped.
    """
    groups = parameters["feature_group_count"]
    if parameters["batch_group_count"] != 1 or groups != layout.groups:
        raise ValueError(
            f"it is convolved in {groups} groups of channels, {parameters['batch_group_count']} of the batch, and "
            f"elsewhere in {layout.groups} groups of channels"
        )
    numbers = parameters["dimension_numbers"]
    in_axes = numbers.rhs_spec[1:]
    patches = jax.lax.conv_general_dilated_patches(
        x.transpose(numbers.lhs_spec),
        filter_shape=[kernel[axis] for axis in in_axes[1:]],
        window_strides=parameters["window_strides"],
        padding=parameters["padding"],
        lhs_dilation=parameters["lhs_dilation"],
        rhs_dilation=parameters["rhs_dilation"],
        precision=jax.lax.Precision.HIGHEST,
    )
    # The channels of a patch run over (input channel, window...), the order of `in_axes`.
    windows = patches.reshape(patches.shape[0], groups, *(kernel[axis] for axis in in_axes), *patches.shape[2:])
    summed = list(zip(in_axes, range(1, 1 + len(in_axes)), strict=True))
    rows = _rows(origin, layout, windows[:, 0].shape, summed, [], groups)
    if groups == 1:
        return windows[:, 0], rows
    made = entries(origin, [numbers.rhs_spec[0]], layout.output_axes)
    if not np.array_equal(made, np.arange(len(made))) or rows.outputs is not None or rows.scales:
        raise ValueError("its outputs are split, re-ordered or scaled before a convolution in groups")
    return windows, _of_groups(rows, groups)


def _of_groups(rows: Rows, groups: int) -> Rows:
    """The rows of one group as those of all; the operand has one more axis, the second one, for them."""
    numbers = np.where(rows.entries[:, None] < 0, -1, rows.entries[:, None] * groups + np.arange(groups))
    return dataclasses.replace(
        rows,
        permutation=(1, *(axis + (axis > 0) for axis in rows.permutation)),
        stack_shape=(groups, *rows.stack_shape),
        entries=numbers.reshape(-1),
        moving=tuple((stride * groups, steps) for stride, steps in rows.moving),
    )


def rows_of_ragged(
    parameters: Mapping[str, Any], shape: Sequence[int], origin: Origin, layout: LeafLayout, sizes: Any
) -> Rows:
    """The rows of a ragged matmul: each stack entry multiplies a run of them.

    Args:
        parameters: of the equation.
        shape: of the operand with the rows.
        origin: of the leaf's operand.
        layout: of the leaf.
        sizes: lengths of the runs.

    Raises:
        ValueError: as for `rows_of_dot`; the runs do not belong to stack entries; the leaf is scaled.
    """
    numbers = parameters["ragged_dot_dimension_numbers"]
    left, right = numbers.dot_dimension_numbers[0]
    (stack,) = numbers.rhs_group_dimensions
    # As if each entry had an operand of its own, along a new first axis.
    summed = [(axis, other + 1) for axis, other in zip(right, left, strict=True)]
    rows = _rows(origin, layout, (origin.axes[stack].size, *shape), summed, [(stack, 0)])
    if not rows.stack_shape or rows.scales:
        raise ValueError("the parts of a ragged matmul do not multiply stack entries of it, or it is scaled before")
    permutation = tuple(axis - 1 for axis in rows.permutation[1:])
    return dataclasses.replace(rows, permutation=permutation, stack_shape=(), row_shape=rows.row_shape, sizes=sizes)


def members(sizes: Int[Array, " E"], rows: int) -> Float32[Array, "E N"]:
    """Which rows are whose: 1 along runs of the given lengths, one after another; what is left is nobody's.

    Example:
        >>> members(jnp.array([2, 0, 1]), 4).tolist()
        [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
    """
    ends, place = jnp.cumsum(sizes)[:, None], jnp.arange(rows)[None]
    return ((place < ends) & (place >= ends - sizes[:, None])).astype(jnp.float32)


def row_weights(mask: Any, row_shape: tuple[int, ...]) -> Array | None:
    """A mask of the inputs as weights of rows.

    Args:
        mask: of shape (B, L), say; None: every row counts once.
        row_shape: (B, L), with more axes behind (each token several rows), (B * L,), or (B,): then a row counts
            where any of its tokens does.

    Raises:
        ValueError: any other shape.
    """
    if mask is None:
        return None
    mask = jnp.asarray(mask).astype(jnp.float32)
    ndim = min(mask.ndim, len(row_shape))
    if row_shape[:ndim] == mask.shape[:ndim] and row_shape:
        if ndim < mask.ndim:
            mask = (mask > 0).any(axis=tuple(range(ndim, mask.ndim))).astype(jnp.float32)
        wide = mask.reshape(*mask.shape, *(1,) * (len(row_shape) - ndim))
        return jnp.broadcast_to(wide, row_shape).reshape(-1)
    if math.prod(row_shape) == mask.size:
        return mask.reshape(-1)
    raise ValueError(
        f"`row_mask` gave shape {mask.shape}, the inputs come in rows of shape {row_shape}: the mask must have the "
        "leading axes of the rows."
    )


def _rows(
    origin: Origin,
    layout: LeafLayout,
    shape: Sequence[int],
    summed: Sequence[tuple[int, int]],
    batched: Sequence[tuple[int, int]],
    groups: int = 1,
) -> Rows:
    """The rows of a contraction; `summed` and `batched` are pairs of axes of the leaf's operand and the other one."""
    free = [axis for axis in range(len(origin.axes)) if axis not in dict(summed) and axis not in dict(batched)]
    axis_roles = roles(origin, [axis for axis, _ in summed], [axis for axis, _ in batched], free)
    _check_roles(axis_roles, {number for axis, _ in batched for number in origin.axes[axis].tables}, layout)
    summed = sorted(summed, key=lambda pair: _major_first(origin, pair[0]))
    stacked = [pair for pair in batched if origin.axes[pair[0]].tables or origin.axes[pair[0]].present is not None]
    stacked = sorted(stacked, key=lambda pair: _major_first(origin, pair[0]))
    width = math.prod(origin.shape[axis] for axis in layout.input_axes)
    features = entries(origin, [axis for axis, _ in summed], layout.input_axes)
    columns, stacks = [axis for _, axis in summed], [axis for _, axis in stacked]
    rows = [axis for axis in range(len(shape)) if axis not in columns and axis not in stacks]
    outputs = np.zeros(math.prod(origin.shape[axis] for axis in layout.output_axes), bool)
    made = entries(origin, free, layout.output_axes)
    outputs[made[made >= 0]] = True
    parts = [axis for axis, _ in summed], [axis for axis, _ in stacked], free
    moving = []
    for k, axis in enumerate(layout.stack_axes):
        if axis in origin.moving:
            moving.append((math.prod(origin.shape[later] for later in layout.stack_axes[k + 1 :]), origin.moving[axis]))
    return Rows(
        permutation=(*stacks, *rows, *columns),
        stack_shape=tuple(shape[axis] for axis in stacks),
        row_shape=tuple(shape[axis] for axis in rows),
        width=width,
        features=None if np.array_equal(features, np.arange(width)) else features,
        entries=entries(origin, [axis for axis, _ in stacked], layout.stack_axes),
        moving=tuple(moving),
        when=origin.when,
        outputs=None if outputs.all() else outputs,
        scales=scales_of(origin, free, dict([*summed, *batched])),
        multiples=multiples_of(origin, parts, int(outputs.sum()), groups),
        visits=_visits(origin, layout),
    )


def check_mask(mask: Any, row_shape: tuple[int, ...]) -> None:
    """Raises, as `row_weights` does, without computing anything."""
    if mask is not None:
        jax.eval_shape(
            lambda array: row_weights(array, row_shape), jax.ShapeDtypeStruct(jnp.shape(mask), jnp.result_type(mask))
        )


def _check_roles(axis_roles: Roles, batched: set[int], layout: LeafLayout) -> None:
    if not axis_roles.inputs or not axis_roles.inputs <= set(layout.input_axes):
        raise ValueError(
            f"A contraction runs over axes {sorted(axis_roles.inputs)}, the input axes are {layout.input_axes}."
        )
    if not batched <= set(layout.stack_axes):
        raise ValueError(f"A matmul has a batch along axes {sorted(batched)}, the stack axes are {layout.stack_axes}.")
    if not axis_roles.outputs <= set(layout.output_axes):
        raise ValueError(
            f"A matmul has outputs along axes {sorted(axis_roles.outputs)}, the output axes are {layout.output_axes}."
        )


def _major_first(origin: Origin, place: int) -> tuple[int, int]:
    """So that columns come in the order of the leaf, where the axes of a value allow it."""
    tables = origin.axes[place].tables
    if not tables:
        return len(origin.shape), 0
    first = min(tables)
    return first, -int(np.abs(np.diff(tables[first])).max(initial=0))


def _visits(origin: Origin, layout: LeafLayout) -> Int[np.ndarray, "..."] | None:
    if len(layout.stack_axes) != 1 or layout.stack_axes[0] not in origin.visits:
        return None
    axis = layout.stack_axes[0]
    return origin.visits[axis] + origin.fixed.get(axis, 0)
