"""What goes through a pausing model beside arrays: parameters, and outputs of kernels that are not written yet."""

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.calibration._site import Site
from jaxcompress.meshes import on_auto_axes


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

    `multiply` is the matmul, as a function of inputs (N, D) and the kernel (D, O). `written` holds the value once it is
    known: one that is read twice (by a GELU) is computed once.
    """

    site: Site
    multiply: Callable[[Any, Any], jax.Array]
    aval: Any
    dtype: Any
    bias: Any = None
    written: list[Any] = dataclasses.field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        """As the model has it."""
        return tuple(self.aval.shape)

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


def adds_bias(other: Weight, output: Output) -> bool:
    """Whether it is a whole leaf, or the same entry of a stack, and adds one number to each output."""
    own = len(output.site.kernel.output_axes)
    added, axes = other.axes[: len(other.axes) - own], other.axes[len(other.axes) - own :]
    same_entry = [index for _, index in other.entry] == [index for _, index in output.site.kernel.entry]
    same_sizes = jnp.shape(other.value)[len(added) :] == output.shape[len(output.shape) - own :]
    return same_entry and same_sizes and set(added) <= {-1} and -1 not in axes and list(axes) == sorted(axes)


def moved(eqn: Any, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes after an equation that only moves them; None after any other."""
    name = eqn.primitive.name
    if name in ("convert_element_type", "copy", "copy_p", "stop_gradient", "sharding_constraint", "reshard"):
        return axes
    if name == "transpose":
        return tuple(axes[axis] for axis in eqn.params["permutation"])
    if name == "broadcast_in_dim":
        before, places_of = eqn.invars[0].aval.shape, eqn.params["broadcast_dimensions"]
        if any(eqn.params["shape"][place] != size for place, size in zip(places_of, before, strict=True)):
            # One number for several outputs.
            return None
        places: Mapping[int, int] = dict(zip(places_of, axes, strict=True))
        return tuple(places.get(axis, -1) for axis in range(len(eqn.params["shape"])))
    if name == "reshape":
        # A bias gets leading axes of size 1.
        sizes, before = eqn.params["new_sizes"], eqn.invars[0].aval.shape
        added = len(sizes) - len(before)
        return (*[-1] * added, *axes) if added >= 0 and tuple(sizes[added:]) == tuple(before) else None
    return None


def plain_value(value: Any) -> Any:
    return value.value if isinstance(value, Weight) else value
