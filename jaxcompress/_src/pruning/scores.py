"""How important each weight is. Low scores are pruned first."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcompress._src.calibration.gradients import gradients
from jaxcompress._src.tree.unselected import map_selected
from jaxcompress._src.types import Params, Selector
from jaxcompress._src.weights.matrices import checked_weight
from jaxcompress._src.weights.selection import selected_layouts

Variant = Literal["normalized", "absolute", "taylor"]


def magnitude_scores(params: Params, *, select: Selector | None = None, layouts: Params | None = None) -> Params:
    """|w|.

    Args:
        params: the tree; a compressed leaf counts as the array it stands for.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`.

    Returns:
        A partial tree of scores, each of its leaf's shape and dtype.

    Raises:
        ValueError: nothing is selected; a selected leaf holds NaN or Inf, or no floats.

    Example:
        >>> magnitude_scores({"kernel": jnp.array([[-2.0, 1.0]]), "bias": jnp.ones(2)})
        {'bias': Unselected, 'kernel': Array([[2., 1.]], dtype=float32)}
    """
    selected = selected_layouts(params, select=select, layouts=layouts)
    return map_selected(lambda path, _, leaf: jnp.abs(checked_weight(path, leaf)), selected, params)


def gradient_scores(
    loss: Callable[[Params, Any], jax.Array],
    params: Params,
    batches: Iterable[Any],
    *,
    variant: Variant = "absolute",
    select: Selector | None = None,
    layouts: Params | None = None,
) -> Params:
    """Importance from the gradient g = mean over batches of dL/dw.

    - "normalized": g / ||g||, the norm taken over every float leaf of the tree;
    - "absolute": |g| / ||g||;
    - "taylor": |w g|, the first-order change of the loss when w is removed.

    Args:
        loss: `(params, batch) -> scalar`.
        params: plain arrays.
        batches: streamed; each is used once, and counts the same.
        variant: one of the three.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`.

    Returns:
        A partial tree of scores.

    Raises:
        ValueError: no batches, an unknown variant, or a gradient that holds NaN or Inf; names the leaf.

    Example:
        >>> def loss(params, x):
        ...     return jnp.sum(x @ params["kernel"])
        >>> params = {"kernel": jnp.array([[2.0], [1.0]])}
        >>> gradient_scores(loss, params, [jnp.array([[3.0, 4.0]])], variant="absolute")["kernel"]
        Array([[0.6],
               [0.8]], dtype=float32)

    References:
        "taylor": Molchanov et al. 2017, "Pruning convolutional neural networks for resource efficient inference".
    """
    if variant not in ("normalized", "absolute", "taylor"):
        raise ValueError(f"`variant` must be 'normalized', 'absolute' or 'taylor', got {variant!r}.")
    selected = selected_layouts(params, select=select, layouts=layouts)
    mean = gradients(loss, params, batches)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(mean)))
    # A gradient of zero everywhere has no direction: its scores are zero.
    norm = jnp.where(norm > 0, norm, 1.0)

    def score(path: str, _: Any, leaf: Any, gradient: Any) -> jax.Array:
        weight = checked_weight(path, leaf)
        if variant == "taylor":
            return jnp.abs(weight * gradient)
        return (jnp.abs(gradient) if variant == "absolute" else gradient) / norm.astype(gradient.dtype)

    return map_selected(score, selected, params, mean)
