"""What goes through a pausing model beside arrays: parameters, and outputs of kernels that are not written yet."""

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.calibration.site import Site
from jaxcompress._src.meshes import on_auto_axes


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter, or a re-arrangement of one.

    `axes` says which of the leaf's axes are left, in order, -1 for new ones; `entry` where others were cut by a scan.
    """

    value: Any
    path: str
    axes: tuple[int, ...]
    entry: tuple[tuple[int, int], ...] = ()

    def at(self, index: int) -> Any:
        """What a scan reads in one iteration."""
        value = on_auto_axes(operator.getitem)(self.value, index)
        if self.axes[0] < 0:
            return value
        entry = tuple(sorted((*self.entry, (self.axes[0], index))))
        return Weight(value, self.path, self.axes[1:], entry)


@dataclasses.dataclass(frozen=True, eq=False)
class Output:
    """What a kernel will have written, once it is known what is added to it: the product, or product and bias.

    Its axes are rows, then outputs, in the order `shape`; axis i of the value as the model has it is the axis
    `axes[i]` of those, and `aval` its type. `multiply` is the matmul, as a function of the inputs (N, D) and the kernel
    (D, O). `use` counts the uses of the kernel before this one, where each is a stop. `written` holds the value once it
    is known: one that is read twice (by a GELU) is computed once.
    """

    site: Site
    multiply: Callable[[Any, Any], jax.Array]
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    aval: Any
    dtype: Any
    use: int = 0
    bias: Any = None
    written: list[Any] = dataclasses.field(default_factory=list)

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of the value, rows first."""
        return tuple(self.axes.index(axis) for axis in range(len(self.axes)))

    @property
    def outputs(self) -> int:
        """O."""
        return math.prod(self.shape[len(self.shape) - len(self.site.kernel.output_axes) :])


def multiply(dtype: Any, precision: Any, written: Any, inputs: Any, kernel: Any) -> jax.Array:
    return jnp.matmul(inputs, jnp.asarray(kernel, dtype), precision=precision, preferred_element_type=written)


def is_float(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))


def is_open(value: Any) -> bool:
    """Whether a kernel is still to write it."""
    return isinstance(value, Output) and not value.written


def rows_first(other: Weight, output: Output) -> Weight:
    """What is added to an output, with its axes in the order of rows and outputs."""
    value = on_auto_axes(jnp.transpose)(other.value, output.order)
    return dataclasses.replace(other, value=value, axes=tuple(other.axes[axis] for axis in output.order))


def adds_bias(other: Weight, output: Output) -> bool:
    """Whether it (rows first) is a whole leaf, or the same entry of a stack, and adds one number to each output."""
    own = len(output.site.kernel.output_axes)
    added, axes = other.axes[: len(other.axes) - own], other.axes[len(other.axes) - own :]
    same_entry = [index for _, index in other.entry] == [index for _, index in output.site.kernel.entry]
    same_sizes = jnp.shape(other.value)[len(added) :] == output.shape[len(output.shape) - own :]
    return same_entry and same_sizes and set(added) <= {-1} and -1 not in axes and list(axes) == sorted(axes)


def cut(eqn: Any, weight: Weight) -> Weight | None:
    """Entries along some axes, such as `w[i]` in a loop of Python; None where more than one is left of an axis."""
    whole, left = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    strides = eqn.params["strides"] or (1,) * len(whole)
    axes, entry = list(weight.axes), dict(weight.entry)
    for axis, (start, step) in enumerate(zip(eqn.params["start_indices"], strides, strict=True)):
        if left[axis] == whole[axis]:
            continue
        if left[axis] != 1 or step != 1 or weight.axes[axis] < 0:
            return None
        entry[weight.axes[axis]], axes[axis] = start, -1
    return dataclasses.replace(weight, axes=tuple(axes), entry=tuple(sorted(entry.items())))


def moved(eqn: Any, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes after an equation that only moves them; None after any other."""
    name = eqn.primitive.name
    if name in ("convert_element_type", "copy", "copy_p", "stop_gradient", "sharding_constraint", "reshard"):
        return axes
    if name == "transpose":
        return tuple(axes[axis] for axis in eqn.params["permutation"])
    if name == "squeeze":
        dropped = eqn.params["dimensions"]
        return None if any(axes[i] >= 0 for i in dropped) else tuple(a for i, a in enumerate(axes) if i not in dropped)
    if name == "broadcast_in_dim":
        before, places_of = eqn.invars[0].aval.shape, eqn.params["broadcast_dimensions"]
        if any(eqn.params["shape"][place] != size for place, size in zip(places_of, before, strict=True)):
            # One number for several outputs.
            return None
        places: Mapping[int, int] = dict(zip(places_of, axes, strict=True))
        return tuple(places.get(axis, -1) for axis in range(len(eqn.params["shape"])))
    if name == "reshape":
        # New axes of size 1 come and go: those of biases, those of entries that were cut out.
        sizes, before = tuple(eqn.params["new_sizes"]), eqn.invars[0].aval.shape
        own = [(axis, size) for axis, size in zip(axes, before, strict=True) if axis >= 0]
        added = len(sizes) - len(own)
        for first in range(added + 1):
            if sizes[first : first + len(own)] == tuple(size for _, size in own):
                return (*[-1] * first, *(axis for axis, _ in own), *[-1] * (added - first))
        return None
    return None


def plain_value(value: Any) -> Any:
    return value.value if isinstance(value, Weight) else value
