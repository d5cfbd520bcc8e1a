"""What a model does with one leaf, and what is assumed when nobody has looked."""

import dataclasses
from typing import Any, Literal

LeafKind = Literal["matmul", "conv", "lookup", "tied", "other", "unused"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafLayout:
    """How a model uses one leaf. Axes are those of the leaf, not negative.

    Invariant: `stack_axes`, `input_axes` and `output_axes` are disjoint and sorted; together they are all axes.

    Attributes:
        kind: "matmul" or "conv" (contracted), "lookup" (rows are gathered), "tied" (gathered and contracted), "other"
            (used, but never so), "unused".
        stack_axes: axes of independent copies: a scan over layers, experts.
        input_axes: the axes that a matmul or convolution sums over; of a table that is looked up, the axes of one row.
        output_axes: one entry per output feature; of a table, per row.
        flops: multiply-adds x 2 of all matmuls and convolutions with the leaf in one call.
        order: place in the order of first use, or None when unused.
        input_id: leaves with the same id (q, k and v, say) multiply the same input; None unless contracted.
        reason: of the kind "other": what the model does with the leaf instead, in words; empty of all other kinds, and
            where nobody has looked.
        groups: of a grouped or depthwise convolution: runs of output features, each of which has inputs of its own.
        spread: of the kind "other": it is repeated along axes of the activations first, as biases, norms and learned
            positions are.
    """

    kind: LeafKind
    stack_axes: tuple[int, ...] = ()
    input_axes: tuple[int, ...] = ()
    output_axes: tuple[int, ...] = ()
    flops: int = 0
    order: int | None = None
    input_id: int | None = None
    reason: str = ""
    groups: int = 1
    spread: bool = False

    @property
    def is_weight(self) -> bool:
        """Whether the leaf is contracted or looked up."""
        return self.kind in ("matmul", "conv", "lookup", "tied")

    @property
    def entry(self) -> "LeafLayout":
        """The layout of one entry of the stack."""

        def left(axes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(axis - sum(stack < axis for stack in self.stack_axes) for axis in axes)

        return dataclasses.replace(
            self, stack_axes=(), input_axes=left(self.input_axes), output_axes=left(self.output_axes)
        )


def default_layout(path: str, leaf: Any) -> LeafLayout:
    """The convention of Flax: kernels are (in..., out), tables called `embedding` are (rows, features...).

    It is a guess: stacked layers, attention outputs, (out, in) kernels need `layouts`.

    Args:
        path: of the leaf; its last part tells embeddings.
        leaf: anything with a shape.

    Returns:
        A layout without FLOPs and order; kind "other" below two axes.

    Example:
        >>> import jax.numpy as jnp
        >>> default_layout("dense/kernel", jnp.ones((3, 4))).input_axes
        (0,)
    """
    axes = tuple(range(len(leaf.shape)))
    if len(axes) < 2:
        return LeafLayout(kind="other", output_axes=axes)
    if path.rsplit("/", 1)[-1] == "embedding":
        return LeafLayout(kind="lookup", input_axes=axes[1:], output_axes=axes[:1])
    return LeafLayout(kind="matmul", input_axes=axes[:-1], output_axes=axes[-1:])
