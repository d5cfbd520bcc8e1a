"""The state of a train step: made once, donated at every step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress.tree import is_unselected, map_with_path
from jaxcompress.types import Params, TransformState, exportable, is_compressed


@exportable
class TrainState(NamedTuple):
    """Everything that a train step changes. All leaves are strongly typed arrays that nobody else holds.

    Attributes:
        params: raw parameters of the student (before the transform).
        transform_state: of the transform.
        optimizer_state: for the trainable float leaves of `params`.
        transform_optimizer_state: for the float leaves of `transform_state.trainable`.
        step: int32 scalar, number of steps done.
        key: typed; split at every step.
    """

    params: Params
    transform_state: TransformState
    optimizer_state: Any
    transform_optimizer_state: Any
    step: jax.Array
    key: jax.Array


def own(tree: Any) -> Any:
    """A copy of every leaf, strongly typed, with its sharding.

    Donating a leaf deletes its buffer for everyone: for a teacher that the student started from, or for a transform
    that remembers the initial weights. And a weakly typed leaf would be traced once more at the second step.

    Raises:
        TypeError: a leaf is no array; the note names it.
    """

    def copy(_: str, leaf: Any) -> jax.Array:
        copied = jnp.array(leaf, copy=True)
        return jnp.asarray(copied, dtype=copied.dtype)

    return map_with_path(copy, tree, is_leaf=_never)


def on_one_mesh(state: TrainState) -> TrainState:
    """The state with what lies on no particular device replicated over the mesh of the parameters, if they have one.

    A step returns all its leaves on the mesh: a counter that started elsewhere would be traced once more.
    """
    shardings = [leaf.sharding for leaf in jax.tree.leaves(state.params)]
    mesh = next((s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding)), None)
    if mesh is None:
        return state
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda leaf: leaf if leaf.committed else jax.device_put(leaf, replicated), state)


def like_before(new: Any, old: Any) -> Any:
    """`new` with strongly typed leaves, checked against the state before the step.

    Raises:
        ValueError: a leaf changed its shape or dtype, which would be traced anew at every step.
    """

    def check(path: str, leaf: Any, before: jax.Array) -> jax.Array:
        leaf = jnp.asarray(leaf)
        if leaf.shape != before.shape or leaf.dtype != before.dtype:
            raise ValueError(
                f"A step changed {path!r} from {before.dtype}{list(before.shape)} to {leaf.dtype}{list(leaf.shape)}."
            )
        return jnp.asarray(leaf, dtype=leaf.dtype)

    return map_with_path(check, new, old, is_leaf=_never)


def forget_fresh(optimizer: optax.GradientTransformation, state: Any, fresh: Any, trainable: Params) -> Any:
    """The optimizer state with zeros in the moments of the weights that start anew.

    Args:
        optimizer: its `init` tells which parts of the state are moments.
        state: of the optimizer.
        fresh: None, or bool arrays where the parameters have leaves (`Unselected`: none are fresh).
        trainable: the tree that the optimizer was initialised with.

    Returns:
        The new state. Moments that have another shape than their weights (factored ones) stay as they are.
    """
    if fresh is None:
        return state

    def mark(_: str, leaf: Any, fresh: Any) -> Any:
        if is_unselected(leaf):
            return leaf
        if is_unselected(fresh) or is_compressed(leaf):
            return jax.tree.map(lambda _: jnp.zeros((), bool), leaf)
        return fresh

    def forget(moment: Any, fresh: Any) -> Any:
        # A leaf that `optax.masked` leaves out has a node of its own in place of a moment.
        if not hasattr(moment, "shape") or (fresh.shape and moment.shape != fresh.shape):
            return moment
        return jnp.where(fresh, jnp.zeros((), moment.dtype), moment)

    marks = map_with_path(mark, trainable, fresh, is_leaf=lambda x: is_unselected(x) or is_compressed(x))
    return optax.tree_utils.tree_map_params(
        optimizer, forget, state, marks, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
    )


def _never(_: Any) -> bool:
    return False
