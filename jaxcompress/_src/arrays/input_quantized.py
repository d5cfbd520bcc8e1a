"""A weight whose matmul inputs are quantized too."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Integer

from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.types import is_compressed


@runtime_checkable
class InputQuantizer(Protocol):
    """How inputs are rounded; hashable, because it is static. `axes` are those that the matmul sums over.

    `scale` and `zero_point` are None (found from `x`), or have one entry or the size of `x` on every axis.
    """

    def codes(self, x: Any, axes: Sequence[int], scale: Any, zero_point: Any) -> QuantizedArray:
        """The codes, one to a byte."""
        ...

    def rounded(self, x: Any, axes: Sequence[int], scale: Any, zero_point: Any) -> jax.Array:
        """The values of the codes, in the dtype of `x`; differentiable."""
        ...


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["weight", "scale", "zero_point"], meta_fields=["inputs"]
)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class InputQuantizedArray:
    """A weight that says: what I am multiplied with is quantized first.

    It stands for the weight alone; `execute` quantizes the inputs of its matmuls and convolutions. Look-ups have none.

    Invariants: `scale` is None (found anew in every call) or has the sizes of leading, stacked axes of the weight;
    `zero_point`, if there is one, has the shape of `scale`.

    Attributes:
        weight: a plain or compressed array.
        inputs: how inputs are rounded.
        scale: float32, of static ranges, or None.
        zero_point: uint8, or float32 while it is learned, or None.
    """

    weight: Any
    inputs: InputQuantizer
    scale: Any = None
    zero_point: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return tuple(self.weight.shape)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.weight.shape)

    @property
    def size(self) -> int:
        """Number of logical entries."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        """Logical dtype."""
        return self.weight.dtype

    @property
    def nbits(self) -> int:
        """Stored bits, those of the weight and of the input's scales."""
        return sum(8 * leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.nbits // 8

    @on_auto_axes
    def materialize(self) -> jax.Array:
        """The plain weight; nothing is left of the quantization of inputs."""
        return self.weight.materialize() if is_compressed(self.weight) else self.weight

    @on_auto_axes
    def take_rows(self, rows: Integer[Array, "..."]) -> jax.Array:
        """`materialize()[rows]`."""
        return self.weight.take_rows(rows) if hasattr(self.weight, "take_rows") else self.weight[rows]

    def input_parameters(self, ndim: int, batch: Sequence[int]) -> tuple[Any, Any]:
        """Scale and zero point, shaped to broadcast against an input.

        Args:
            ndim: of the input.
            batch: its axes that run along the weight's stacked axes.
        """
        if self.scale is None:
            return None, None
        if self.scale.ndim not in (0, len(batch)):
            raise ValueError(
                f"Input scales of shape {self.scale.shape} belong to stacked weights, but the matmul has batch axes "
                f"{tuple(batch)} alone."
            )
        shape = [1] * ndim
        for axis, size in zip(batch, self.scale.shape, strict=False):
            shape[axis] = size
        return self.scale.reshape(shape), None if self.zero_point is None else self.zero_point.reshape(shape)


@on_auto_axes
def input_rounded(leaf: InputQuantizedArray, x: Float[Array, "..."], axes: Sequence[int]) -> jax.Array:
    """The input of a weight that is not stacked, rounded.

    Args:
        leaf: the weight.
        x: its input.
        axes: of `x`, those that are summed over.
    """
    return leaf.inputs.rounded(x, axes, *leaf.input_parameters(x.ndim, ()))
