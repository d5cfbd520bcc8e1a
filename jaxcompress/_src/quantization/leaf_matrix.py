"""Leaves as matrices with their scales: where one-shot methods round.

Shape letters: S stack entries, D inputs, R outputs, G groups of inputs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Num, Shaped

from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.calibration.leaf_part import LeafPart
from jaxcompress._src.calibration.sites import sites_and_refusals
from jaxcompress._src.quantization.blocks import PARTIAL, cut, packing_axis, padded_shape, partial_axis
from jaxcompress._src.quantization.round_to_nearest import cropped, padded, store_codes, store_zero_points
from jaxcompress._src.quantization.spec import QuantSpec
from jaxcompress._src.trace.layout import LeafLayout
from jaxcompress._src.trace.layouts import layouts
from jaxcompress._src.tree.checks import is_traced
from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.types import Params, Selector
from jaxcompress._src.weights.matrices import MatrixLeaf
from jaxcompress._src.weights.selection import misfits

_Leaf = TypeVar("_Leaf", bound=MatrixLeaf)

MATRIX = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
"""Of one matrix, (D, R)."""

STACK = LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,))
"""Of a stack of them, (S, D, R)."""


def plain_kernels(
    apply: Callable[..., Any], params: Params, inputs: Sequence[Any]
) -> tuple[list[LeafPart], dict[str, str]]:
    """Every kernel (or stack entry) that plain matmuls read, once for each of them, in the order of the model.

    Other kernels, of experts and of convolutions, say, come second, by path, with a sentence that says why.
    """
    kinds = {path: layout.kind for path, layout in leaves_with_paths(layouts(apply, params, *inputs))}
    parts, refused = sites_and_refusals(apply, params, *inputs, repeated="each")
    others = {path: refused[path] for path in refused if kinds[path] == "matmul"}
    others |= {path: f"Leaf {path!r} is the kernel of a convolution." for path, kind in kinds.items() if kind == "conv"}
    return [part for part in parts if kinds[part.path] == "matmul"], others


def stored(
    entry: MatrixLeaf,
    codes: Integer[Array, "S D R"],
    scale: Float[Array, "S G r"],
    zero_point: Num[Array, "S g r0"] | None,
    spec: QuantSpec,
) -> QuantizedArray:
    """The compressed leaf of codes and scales that are in matrix form.

    Args:
        entry: the leaf.
        codes: as `round_to_codes` gives them; of whole groups, as `with_whole_groups` makes them.
        scale: blocks of the matrix; those of the leaf in the order of its flattened axes.
        zero_point: blocks of the matrix, as the scales, or None.
        spec: bits.
    """
    shape = entry.weight.shape
    blocks = cut(shape, spec, entry.layout)
    whole = dataclasses.replace(entry, weight=padded(entry.weight, spec, entry.layout))
    leaf_codes = cropped(whole.leaf(codes), shape)
    data = store_codes(leaf_codes, bits=spec.bits, axis=packing_axis(shape, spec.bits, entry.layout))
    zeros = None if zero_point is None else _blocks_of_leaf(entry.layout, entry.ungrouped(zero_point), blocks)
    return QuantizedArray(
        data=data,
        scale=_blocks_of_leaf(entry.layout, entry.ungrouped(scale), blocks),
        zero_point=store_zero_points(zeros, spec.bits, entry.layout),
        dtype=jnp.dtype(entry.weight.dtype),
        levels=spec.levels,
        partial=partial_axis(shape, spec, entry.layout),
    )


def fitting(leaves: Sequence[_Leaf], spec: QuantSpec, select: Selector | None) -> list[_Leaf]:
    """The leaves that the blocks of `spec` divide: others are left out, with a warning, unless `select` asked for them.

    Raises:
        trace.BlockError: see `without_misfits`.
    """
    places = {leaf.path: (leaf.weight.shape, leaf.layout) for leaf in leaves}
    rest = misfits(places, lambda _, shape, layout: cut(shape, spec, layout), select, advice=PARTIAL)
    return [leaf for leaf in leaves if leaf.path not in rest]


def with_whole_groups(
    entry: MatrixLeaf, x: Shaped[Array, "..."], spec: QuantSpec, *axes: int, mode: str = "constant", fill: float = 0.0
) -> Shaped[Array, "..."]:
    """An array over the inputs of a leaf, continued up to the end of its partial groups.

    Args:
        entry: the leaf, as it is.
        x: has D entries on each of `axes`, one for each input: weights, a Gram matrix, factors.
        spec: gives the groups.
        axes: those.
        mode: of `jnp.pad`: zeros are inputs that never occur; "edge" repeats the last weight of a group.
        fill: the constant.
    """
    shape, whole = entry.weight.shape, padded_shape(entry.weight.shape, spec, entry.layout)
    if whole == shape:
        return x
    sizes = [shape[axis] for axis in entry.layout.input_axes]
    more = [(0, whole[axis] - shape[axis]) for axis in entry.layout.input_axes]
    options = {"constant_values": fill} if mode == "constant" else {}
    for axis in axes:
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        parts = x.reshape(*before, *sizes, *after)
        parts = jnp.pad(parts, [*[(0, 0)] * len(before), *more, *[(0, 0)] * len(after)], mode=mode, **options)
        x = parts.reshape(*before, -1, *after)
    return x


def without_filling(entry: MatrixLeaf, x: Shaped[Array, "D R"], spec: QuantSpec) -> Shaped[Array, "d R"]:
    """What `with_whole_groups` has put behind partial groups taken off again."""
    whole = dataclasses.replace(entry, weight=padded(entry.weight, spec, entry.layout))
    return entry.matrix(cropped(whole.leaf(x[None]), entry.weight.shape))[0]


def check_blocks(entry: MatrixLeaf, spec: QuantSpec) -> None:
    """Raises, naming the leaf, when the blocks do not divide it, or when it has zeros that its format does not."""
    if not spec.number_format.has_zero and not is_traced(entry.weight) and bool((entry.weight == 0).any()):
        numbers = "one bit" if spec.bits == 1 else f"format {spec.number_format.name!r}"
        raise ValueError(
            f"Leaf {entry.path!r} holds zeros, which {numbers} does not have; `quantize` stores them as a mask."
        )
    if entry.layout.groups > 1 and (spec.per_tensor or spec.group_outputs > 1):
        raise ValueError(
            f"Leaf {entry.path!r} is the kernel of a grouped convolution, whose groups are rounded one by one: give a "
            "spec without `per_tensor` and `group_outputs`, or exclude it."
        )
    try:
        cut(entry.weight.shape, spec, entry.layout)
    except ValueError as err:
        err.add_note(f"at leaf {entry.path!r}")
        raise


def _blocks_of_leaf(layout: LeafLayout, parameter: Shaped[Array, "S g r"], blocks: tuple[int, ...]) -> Array:
    """Scales in matrix form -> in the leaf's layout; axes of size 1 stay 1."""
    permutation = (*layout.stack_axes, *layout.input_axes, *layout.output_axes)
    shape = [
        blocks[axis] if parameter.shape[place] > 1 else 1
        for place, axes in enumerate((layout.stack_axes, layout.input_axes, layout.output_axes))
        for axis in axes
    ]
    places = sorted(range(len(permutation)), key=lambda i: permutation[i])
    return parameter.reshape(shape).transpose(places)
