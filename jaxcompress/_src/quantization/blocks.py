"""Which weights share a scale, and along which axis codes are packed."""

import math
from collections.abc import Sequence
from typing import Any

from jaxcompress._src.arrays.packed import codes_per_block
from jaxcompress._src.arrays.quantized import is_split
from jaxcompress._src.quantization.spec import QuantSpec
from jaxcompress._src.trace.layout import LeafLayout
from jaxcompress._src.weights.selection import BlockError


def scale_shape(shape: Sequence[Any], spec: QuantSpec, layout: LeafLayout) -> tuple[Any, ...]:
    """The number of blocks on every axis: the shape of the scales.

    A leaf without input axes (a bias, say) gets one scale per stacked copy.

    Args:
        shape: of the leaf.
        spec: gives the granularity.
        layout: gives the axes.

    Returns:
        One entry per axis; it divides the size of the axis.

    Raises:
        ValueError: the layout has other axes, or the group size does not fit (`trace.BlockError`); lists the sizes that
            would. Partial groups count once the leaf is padded, see `padded_shape`.

    Example:
        >>> from jaxcompress.trace import LeafLayout
        >>> attention_output = LeafLayout(kind="matmul", input_axes=(0, 1), output_axes=(2,))
        >>> scale_shape((12, 32, 384), QuantSpec(bits=4, group_size=64), attention_output)
        (6, 1, 384)
    """
    inputs, outputs, stack = layout.input_axes, layout.output_axes, layout.stack_axes
    if sorted((*inputs, *outputs, *stack)) != list(range(len(shape))):
        raise ValueError(f"The layout {layout} does not describe the axes of an array of shape {tuple(shape)}.")
    blocks = [1] * len(shape)
    for axis in stack if spec.per_tensor or not inputs else (*stack, *outputs):
        blocks[axis] = shape[axis]
    if spec.group_size is not None:
        sizes = _group_extents(tuple(shape[axis] for axis in inputs), spec.group_size, "group_size", "input")
        if spec.group_outputs > 1:
            along = tuple(shape[axis] for axis in outputs)
            sizes += _group_extents(along, spec.group_outputs, "group_outputs", "output")
        for axis, size in zip((*inputs, *outputs), sizes, strict=False):
            blocks[axis] = shape[axis] // size
    return tuple(blocks)


def padded_shape(shape: Sequence[Any], spec: QuantSpec, layout: LeafLayout) -> tuple[Any, ...]:
    """The shape in which every group is whole; `shape` itself unless the spec has partial groups.

    One input axis grows, the innermost whose size does not divide what is left of the group size.

    Example:
        >>> from jaxcompress.trace import LeafLayout
        >>> layout = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
        >>> padded_shape((100, 8), QuantSpec(bits=4, group_size=32, partial_groups=True), layout)
        (128, 8)
    """
    padded, left = list(shape), spec.group_size
    if not spec.partial_groups or left is None or 0 in shape:
        return tuple(shape)
    for axis in reversed(layout.input_axes):
        if left % shape[axis]:
            padded[axis] = -(-shape[axis] // left) * left
            break
        left //= shape[axis]
    return tuple(padded)


PARTIAL = "Give `select` without them, or `QuantSpec(partial_groups=True)` for a last group that may be shorter."
"""What to do about leaves that cannot be cut."""


def cut(shape: Sequence[Any], spec: QuantSpec, layout: LeafLayout) -> tuple[Any, ...]:
    """The number of blocks on every axis once the leaf is padded; raises as `scale_shape`."""
    return scale_shape(padded_shape(shape, spec, layout), spec, layout)


def partial_axis(shape: Sequence[int], spec: QuantSpec, layout: LeafLayout) -> tuple[int, int] | None:
    """`QuantizedArray.partial` of a leaf: the axis, negative, and the size of its groups; None where all are whole."""
    padded, blocks = padded_shape(shape, spec, layout), cut(shape, spec, layout)
    for axis, (size, whole, count) in enumerate(zip(shape, padded, blocks, strict=True)):
        if size != whole and count > 1:
            return axis - len(shape), whole // count
    return None


def reduced_axes(shape: Sequence[Any], blocks: Sequence[Any]) -> tuple[int, ...]:
    """The axes of `arrays.split_blocks(x, blocks)` that lie within one block."""
    axes, at = [], 0
    for size, count in zip(shape, blocks, strict=True):
        split = is_split(size, count)
        if split or count == 1:
            axes.append(at + split)
        at += 1 + split
    return tuple(axes)


def packing_axis(shape: Sequence[int], bits: int, layout: LeafLayout) -> int:
    """The axis along which codes fill bytes, negative: the innermost input axis.

    An axis with fewer codes than fill whole bytes (the one input of a depthwise convolution) would be mostly padding:
    then it is the longest axis that is not stacked.

    Raises:
        ValueError: the array is a scalar.
    """
    if not shape:
        raise ValueError("A scalar has no axis along which to store codes; exclude it.")
    free = [axis for axis in range(len(shape)) if axis not in layout.stack_axes]
    axis = layout.input_axes[-1] if layout.input_axes else free[-1]
    if shape[axis] < 8 and shape[axis] % codes_per_block(bits):
        axis = max(free, key=lambda i: shape[i])
    return axis - len(shape)


def axes_of(layout: LeafLayout) -> LeafLayout:
    """The axes alone, so that equal leaves of a model share one compiled function."""
    return LeafLayout(
        kind="other", stack_axes=layout.stack_axes, input_axes=layout.input_axes, output_axes=layout.output_axes
    )


def _group_extents(sizes: tuple[int, ...], group_size: int, name: str, axes: str) -> tuple[int, ...]:
    """How far a group of consecutive inputs reaches along every input axis: (12, 32), 64 -> (2, 32)."""
    if 0 in sizes:
        return (1,) * len(sizes)
    fitting = _fitting_sizes(sizes)
    if group_size not in fitting:
        raise BlockError(
            f"`{name}` {group_size} does not divide the {axes} axes of sizes {sizes}, the innermost last; "
            f"sizes that do: {', '.join(map(str, fitting)) or f'none (the leaf has no {axes} axes)'}."
        )
    extents = []
    for size in reversed(sizes):
        extents.append(math.gcd(size, group_size))
        group_size //= extents[-1]
    return tuple(reversed(extents))


def _fitting_sizes(sizes: tuple[int, ...]) -> list[int]:
    fitting, inner = set[int](), 1
    for size in reversed(sizes):
        fitting |= {inner * part for part in range(1, size + 1) if size % part == 0}
        inner *= size
    return sorted(fitting)
