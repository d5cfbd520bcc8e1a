"""Which weights share a scale, and along which axis codes are packed."""

import math
from collections.abc import Sequence

from jaxcompress.arrays import codes_per_block
from jaxcompress.quantization._spec import QuantSpec
from jaxcompress.trace import LeafLayout


def scale_shape(shape: Sequence[int], spec: QuantSpec, layout: LeafLayout) -> tuple[int, ...]:
    """The number of blocks on every axis: the shape of the scales.

    A leaf without input axes (a bias, say) gets one scale per stacked copy.

    Args:
        shape: of the leaf.
        spec: gives the granularity.
        layout: gives the axes.

    Returns:
        One entry per axis; it divides the size of the axis.

    Raises:
        ValueError: the layout has other axes, or the group size does not fit; lists the sizes that would.

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


def reduced_axes(shape: Sequence[int], blocks: Sequence[int]) -> tuple[int, ...]:
    """The axes of `arrays.split_blocks(x, blocks)` that lie within one block."""
    axes, at = [], 0
    for size, count in zip(shape, blocks, strict=True):
        is_split = 1 < count < size
        if is_split or count == 1:
            axes.append(at + is_split)
        at += 1 + is_split
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
        raise ValueError(
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
