"""The state of a train step: made once, donated at every step."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental.shard_alike import shard_alike

from jaxcompress._src.distillation.placement import put
from jaxcompress._src.tree.checks import is_traced
from jaxcompress._src.tree.maps import map_with_path
from jaxcompress._src.tree.paths import path_string
from jaxcompress._src.tree.unselected import is_unselected
from jaxcompress._src.types import Params, TransformState, exportable, is_compressed


@exportable
class TrainState(NamedTuple):
    """Everything that a train step changes. All leaves are strongly typed arrays that nobody else holds.

    Attributes:
        params: raw parameters of the student (before the transform), mutable collections included.
        transform_state: of the transform.
        optimizer_state: for the trainable float leaves of `params`.
        transform_optimizer_state: for the float leaves of `transform_state.trainable`.
        step: int32 scalar, number of steps done, skipped ones included.
        key: typed; split at every step.
        masters: wide copies of trained leaves of `params`, which are their casts, with `master_dtype`; else empty.
        ema: `Averages` of what is trained, with `ema`; else empty.
        loss_scale: of a `DynamicLossScale`; else empty.
    """

    params: Params
    transform_state: TransformState
    optimizer_state: Any
    transform_optimizer_state: Any
    step: jax.Array
    key: jax.Array
    masters: Params = ()
    ema: Any = ()
    loss_scale: Any = ()


def copy_of(tree: Any) -> Any:
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


def placed(state: TrainState) -> TrainState:
    """The state with everything on the mesh of the parameters, if they have one.

    What belongs to a leaf of the parameters (its path ends like the leaf's, its shape is the same: scores, masks,
    moments) lies where the leaf does; of the rest, what lies on no particular device is replicated. A step returns all
    its leaves on the mesh: what started elsewhere would be compiled once more.
    """
    arrays = jax.tree_util.tree_flatten_with_path(state.params)[0]
    if any(is_traced(leaf) for _, leaf in arrays):
        return state
    owners = {path_string(keys): leaf for keys, leaf in arrays}
    mesh = next((x.sharding.mesh for x in owners.values() if isinstance(x.sharding, jax.sharding.NamedSharding)), None)
    if mesh is None:
        return state
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def place(keys: Any, leaf: jax.Array) -> jax.Array:
        owner = _owner(path_string(keys), leaf, owners)
        if owner is None:
            return leaf if leaf.committed else put(leaf, replicated)
        return leaf if leaf.sharding == owner.sharding else put(leaf, owner.sharding)

    return jax.tree_util.tree_map_with_path(place, state)


def matched_to(new: Any, old: Any) -> Any:
    """`new` with strongly typed leaves that lie where those before did, checked against the state before the step.

    Raises:
        ValueError: a leaf changed its shape or dtype, which would be traced anew at every step.
    """

    def check(path: str, leaf: Any, before: jax.Array) -> jax.Array:
        leaf = jnp.asarray(leaf)
        if leaf.shape != before.shape or leaf.dtype != before.dtype:
            raise ValueError(
                f"A step changed {path!r} from {before.dtype}{list(before.shape)} to {leaf.dtype}{list(leaf.shape)}."
            )
        return _alike(jnp.asarray(leaf, dtype=leaf.dtype), before)

    return map_with_path(check, new, old, is_leaf=_never)


def unless(skipped: jax.Array, new: Any, old: Any) -> Any:
    """`new`, or `old` where a step is skipped."""
    return jax.tree.map(lambda x, y: jnp.where(skipped, y, x), new, old)


def are_finite(*trees: Any) -> jax.Array:
    """Whether all floats of some trees are finite; a bool scalar."""
    leaves = [leaf for leaf in jax.tree.leaves(trees) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return functools.reduce(jnp.logical_and, [jnp.isfinite(leaf).all() for leaf in leaves], jnp.ones((), bool))


def reset_moments(optimizer: optax.GradientTransformation, state: Any, fresh: Any, trainable: Params) -> Any:
    """The optimizer state with zeros in the moments of weights that a transform has replaced.

    Args:
        optimizer: its `init` tells which parts of the state are moments.
        state: of the optimizer.
        fresh: which weights those are: None, or bool arrays where the parameters have leaves (`Unselected`: none).
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

    def reset(moment: Any, fresh: Any) -> Any:
        # A leaf that `optax.masked` leaves out has a node of its own in place of a moment.
        if not hasattr(moment, "shape") or (fresh.shape and moment.shape != fresh.shape):
            return moment
        return jnp.where(fresh, jnp.zeros((), moment.dtype), moment)

    marks = map_with_path(mark, trainable, fresh, is_leaf=lambda x: is_unselected(x) or is_compressed(x))
    return optax.tree_utils.tree_map_params(
        optimizer, reset, state, marks, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
    )


def _owner(path: str, leaf: jax.Array, owners: dict[str, Any]) -> Any:
    """The leaf of the parameters that a leaf of the state belongs to, or None."""
    parts = path.split("/")
    for start in range(len(parts)):
        owner = owners.get("/".join(parts[start:]))
        if owner is not None and owner.shape == leaf.shape:
            return owner
    return None


def _alike(leaf: jax.Array, before: jax.Array) -> jax.Array:
    """`leaf`, sharded as another array: a step that moved its state would be compiled once more."""
    if not is_traced(leaf) or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    sharding = jax.typeof(before).sharding
    if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(leaf, sharding)
    return shard_alike(leaf, before)[0]


def _never(_: Any) -> bool:
    return False
