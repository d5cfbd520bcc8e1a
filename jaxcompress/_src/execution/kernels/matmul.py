"""A product with a compressed leaf, as kernels see it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcompress._src.arrays.protocol import reshape

Order = Literal["inputs first", "outputs first"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matmul:
    """`lax.dot_general` of a compressed leaf and a plain operand.

    Attributes:
        leaf: the compressed operand.
        other: the plain one.
        side: where the leaf stands, 0 for left and 1 for right.
        parameters: of `lax.dot_general`.
    """

    leaf: Any
    other: Any
    side: int
    parameters: Mapping[str, Any]

    def with_operands(self, left: Any, right: Any) -> "Matmul":
        """The same product of other operands, such as the codes of these."""
        leaf, other = (left, right) if self.side == 0 else (right, left)
        return dataclasses.replace(self, leaf=leaf, other=other)

    @property
    def leaf_axes(self) -> tuple[int, ...]:
        """The axes of the leaf that are summed over."""
        return self._axes[0]

    @property
    def _axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The contracted axes of the leaf, and of the other operand."""
        contracted, _ = self.parameters["dimension_numbers"]
        return tuple(contracted[self.side]), tuple(contracted[1 - self.side])

    @property
    def rows(self) -> int:
        """Rows of the plain operand, tokens mostly."""
        return math.prod(size for axis, size in enumerate(self.other.shape) if axis not in self._axes[1])

    @property
    def inputs(self) -> int:
        """Entries that each sum runs over."""
        return math.prod(self.leaf.shape[axis] for axis in self._axes[0])

    @property
    def outputs(self) -> int:
        """Sums of each row."""
        return math.prod(size for axis, size in enumerate(self.leaf.shape) if axis not in self._axes[0])

    @property
    def dtype(self) -> Any:
        """Of the result."""
        return self.parameters["preferred_element_type"] or jnp.result_type(self.leaf.dtype, self.other.dtype)

    @property
    def order(self) -> Order | None:
        """How the leaf is a matrix, or None where its axes are mixed or stacked."""
        _, batch = self.parameters["dimension_numbers"]
        axes, ndim = self._axes[0], self.leaf.ndim
        if batch[0] or not axes:
            return None
        if axes == tuple(range(len(axes))):
            return "inputs first"
        return "outputs first" if axes == tuple(range(ndim - len(axes), ndim)) else None

    def flat_leaf(self) -> Any:
        """The leaf as a matrix in its own order; None where its stored form has none."""
        if self.order is None:
            return None
        shape = (self.inputs, self.outputs) if self.order == "inputs first" else (self.outputs, self.inputs)
        return self.leaf if self.leaf.shape == shape else reshape(self.leaf, shape)

    def flat_other(self) -> jax.Array:
        """The plain operand as (rows, inputs)."""
        contracted = self._axes[1]
        free = [axis for axis in range(self.other.ndim) if axis not in contracted]
        return self.other.transpose((*free, *contracted)).reshape(self.rows, self.inputs)

    def unflattened(self, y: jax.Array) -> jax.Array:
        """The result, from (rows, outputs)."""
        axes, contracted = self._axes
        outputs = [size for axis, size in enumerate(self.leaf.shape) if axis not in axes]
        rows = [size for axis, size in enumerate(self.other.shape) if axis not in contracted]
        y = y.reshape(*rows, *outputs)
        if self.side == 0:
            y = y.transpose((*range(len(rows), y.ndim), *range(len(rows))))
        return y

    def __str__(self) -> str:
        """Such as `8 x 384 x 1536`."""
        return f"{self.rows} x {self.inputs} x {self.outputs}"
