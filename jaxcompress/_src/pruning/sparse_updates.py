"""Fine-tuning at fixed masks with any optimizer."""

from typing import Any

import jax.numpy as jnp
import optax

from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.tree.maps import map_with_path
from jaxcompress._src.tree.unselected import is_unselected
from jaxcompress._src.types import Params, is_compressed


def sparse_updates(masks: Params) -> optax.GradientTransformation:
    """An optax transformation that zeroes the updates of pruned weights: those that are zero stay exactly zero.

    Put it last in an `optax.chain`: then neither weight decay nor momentum nor Adam's moments before it move a pruned
    weight. Put it first as well where gradients are clipped by their norm, which pruned weights should not count in.

    Args:
        masks: a partial tree of bool, True = kept; leaves without a mask are updated as ever. May have been made
            for the whole tree of parameters or for its trainable part.

    Returns:
        A stateless gradient transformation.

    Raises:
        ValueError: from `update`: masks and updates differ in structure, or a mask does not have its leaf's shape;
            names the leaf.

    Example:
        >>> optimizer = optax.chain(optax.sgd(0.5, momentum=0.9), sparse_updates({"w": jnp.array([True, False])}))
        >>> params = {"w": jnp.array([2.0, 0.0])}
        >>> updates, _ = optimizer.update({"w": jnp.ones(2)}, optimizer.init(params), params)
        >>> optax.apply_updates(params, updates)["w"]
        Array([1.5, 0. ], dtype=float32)
    """

    @on_auto_axes
    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        del params
        return map_with_path(_masked, updates, masks, is_leaf=_is_leaf), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _masked(_: str, update: Any, mask: Any) -> Any:
    if is_unselected(mask) or is_unselected(update) or isinstance(update, optax.MaskedNode):
        return update
    if is_compressed(update):
        raise ValueError("A compressed leaf has no mask of its own here: its parts are updated one by one.")
    if update.shape != mask.shape:
        raise ValueError(f"The mask has shape {mask.shape}, the update {update.shape}.")
    return jnp.where(mask, update, jnp.zeros((), update.dtype))


def _is_leaf(leaf: Any) -> bool:
    return is_unselected(leaf) or is_compressed(leaf) or isinstance(leaf, optax.MaskedNode)
