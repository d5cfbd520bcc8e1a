"""The rows that a contraction multiplies by a leaf, as one matrix, and the weights of those rows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from jaxcompress.trace import LeafLayout, Origin


class Rows(NamedTuple):
    """How to bring the other operand of a contraction into (stack..., rows, features).

    Attributes:
        permutation: of its axes: stack axes in the order of the leaf, rows, features in the order of the leaf.
        stack: the leaf's axes behind the stack axes.
        stack_shape: their sizes.
        row_shape: of the rows, before they are flattened.
        width: number of features.
    """

    permutation: tuple[int, ...]
    stack: tuple[int, ...]
    stack_shape: tuple[int, ...]
    row_shape: tuple[int, ...]
    width: int

    def matrix(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """The rows as one matrix for each stack entry."""
        return x.transpose(self.permutation).reshape(*self.stack_shape, math.prod(self.row_shape), self.width)


def rows_of_dot(
    parameters: Mapping[str, Any], side: int, shape: Sequence[int], origin: Origin, layout: LeafLayout, width: int
) -> Rows:
    """The rows of a `dot_general`.

    Args:
        parameters: of the equation.
        side: which operand is the leaf.
        shape: of the other operand.
        origin: of the leaf's operand.
        layout: of the leaf.
        width: number of the leaf's input features.

    Raises:
        ValueError: the contraction is not over all of the input axes, or its batch axes are no stack axes.
    """
    contracted, batch = parameters["dimension_numbers"]
    features = _ordered([origin.axes[axis] for axis in contracted[side]], contracted[1 - side], layout)
    stacked: dict[int, int] = {}
    for own, other in zip(batch[side], batch[1 - side], strict=True):
        axes = origin.axes[own]
        if axes and (len(axes) > 1 or axes[0] not in layout.stack_axes or axes[0] in stacked):
            raise ValueError(f"A batched matmul runs over axes {axes}, the stack axes are {layout.stack_axes}.")
        if axes:
            stacked[axes[0]] = other
    return _rows(shape, {axis: stacked[axis] for axis in sorted(stacked)}, features, width, layout)


def rows_of_conv(
    parameters: Mapping[str, Any], x: Any, kernel: Sequence[int], origin: Origin, layout: LeafLayout, width: int
) -> tuple[Shaped[Array, "..."], Rows]:
    """The patches that a convolution multiplies by its kernel, and how to flatten them.

    Raises:
        ValueError: a grouped convolution.
    """
    groups = {name: parameters[name] for name in ("feature_group_count", "batch_group_count")}
    if any(count != 1 for count in groups.values()):
        raise ValueError(f"Inputs of grouped convolutions are not gathered, got {groups}; exclude the leaf.")
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
    windows = patches.reshape(patches.shape[0], *(kernel[axis] for axis in in_axes), *patches.shape[2:])
    places = range(1, 1 + len(in_axes))
    features = _ordered([origin.axes[axis] for axis in in_axes], places, layout)
    return windows, _rows(windows.shape, {}, features, width, layout)


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


def _ordered(axes: list[tuple[int, ...]], places: Sequence[int], layout: LeafLayout) -> list[int]:
    """The other operand's contracted axes, in the order of the leaf's input axes."""
    covered = {axis for merged in axes for axis in merged}
    if covered != set(layout.input_axes):
        raise ValueError(f"A contraction runs over axes {sorted(covered)}, the input axes are {layout.input_axes}.")
    order = sorted(range(len(axes)), key=lambda place: (axes[place], place))
    return [places[place] for place in order]


def _rows(
    shape: Sequence[int], stacked: Mapping[int, int], features: Sequence[int], width: int, layout: LeafLayout
) -> Rows:
    found = math.prod(shape[axis] for axis in features)
    if found != width:
        raise ValueError(
            f"A contraction runs over {found} of the {width} inputs along axes {layout.input_axes}: a part of the "
            "leaf has no statistics of its own; exclude it, or store the parts as leaves."
        )
    free = [axis for axis in range(len(shape)) if axis not in features and axis not in stacked.values()]
    return Rows(
        permutation=(*stacked.values(), *free, *features),
        stack=tuple(stacked),
        stack_shape=tuple(shape[axis] for axis in stacked.values()),
        row_shape=tuple(shape[axis] for axis in free),
        width=width,
    )
