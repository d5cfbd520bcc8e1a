"""The state of a train step: made once, donated at every step."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxcompress._src.arrays.sharding import spec_entries, ways
from jaxcompress._src.distillation.placement import put
from jaxcompress._src.tree.checks import is_traced
from jaxcompress._src.tree.maps import leaves_with_paths, map_with_path
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
    moments) lies where the leaf does. So do parts of it, along the axes that they have: shapes with 1 in place of some
    axes, perhaps with further axes behind (scales of whole axes, the factors of `lora`, which are cut along the axis
    they have where the leaf is cut along another). Of the rest, what lies on no
    particular device is replicated. A step returns all its leaves on the mesh: what started elsewhere would be compiled
    once more.
    """
    arrays = leaves_with_paths(state.params, is_leaf=_never)
    if any(is_traced(leaf) for _, leaf in arrays):
        return state
    owners = {path: (leaf.shape, leaf.sharding) for path, leaf in arrays}
    for path, leaf in leaves_with_paths(state.params):
        if is_compressed(leaf) and (sharding := _sharding_of(leaf)) is not None:
            owners[path] = (leaf.shape, sharding)
    mesh = next((known.mesh for _, known in owners.values() if isinstance(known, NamedSharding)), None)
    if mesh is None:
        return state
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(path: str, leaf: Any) -> jax.Array:
        sharding = _inherited(path, leaf, owners)
        if sharding is None:
            return leaf if leaf.committed else put(leaf, replicated)
        return leaf if leaf.sharding == sharding else put(leaf, sharding)

    return map_with_path(place, state, is_leaf=_never)


def shardings_of(state: TrainState) -> tuple[NamedSharding | None, ...]:
    """Where the leaves of a state lie, as a static argument of the step; empty where none is on a mesh."""
    leaves = jax.tree.leaves(state)
    shardings = [None if is_traced(leaf) else getattr(leaf, "sharding", None) for leaf in leaves]
    named = tuple(_canonical(each) if isinstance(each, NamedSharding) else None for each in shardings)
    return named if any(each is not None for each in named) else ()


def unflatten_shardings(state: TrainState, shardings: tuple[NamedSharding | None, ...]) -> TrainState:
    """What `shardings_of` has found, in the structure of the state; None where a leaf is on no mesh."""
    structure = jax.tree.structure(state)
    return structure.unflatten(shardings or [None] * structure.num_leaves)


def matched_to(new: TrainState, old: TrainState, places: TrainState) -> TrainState:
    """`new` with strongly typed leaves, checked against the state before the step, that lie where those before did.

    Args:
        new: after the step.
        old: before it.
        places: from `unflatten_shardings`, of `old`.

    Raises:
        ValueError: a leaf changed its shape or dtype, which would be traced anew at every step.
    """

    def check(path: str, leaf: Any, before: jax.Array, sharding: NamedSharding | None) -> jax.Array:
        leaf = jnp.asarray(leaf)
        if leaf.shape != before.shape or leaf.dtype != before.dtype:
            raise ValueError(
                f"A step changed {path!r} from {before.dtype}{list(before.shape)} to {leaf.dtype}{list(leaf.shape)}."
            )
        return _alike(jnp.asarray(leaf, dtype=leaf.dtype), before, sharding)

    return map_with_path(check, new, old, places, is_leaf=_never)


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


@functools.lru_cache(maxsize=4096)
def _canonical(sharding: NamedSharding) -> NamedSharding:
    """The same sharding as a step returns it: otherwise its second call would be traced anew."""
    entries = [entry[0] if isinstance(entry, tuple) and len(entry) == 1 else entry or None for entry in sharding.spec]
    while entries and entries[-1] is None:
        entries.pop()
    return NamedSharding(sharding.mesh, PartitionSpec(*entries), memory_kind=sharding.memory_kind)


def _inherited(path: str, leaf: jax.Array, owners: dict[str, tuple[tuple[int, ...], Any]]) -> Any:
    """The sharding that a leaf of the state takes from the leaf of the parameters that it belongs to, or None."""
    parts = path.split("/")
    for start in range(len(parts)):
        shape, sharding = owners.get("/".join(parts[start:]), (None, None))
        if shape == leaf.shape:
            return sharding
        if shape is None or leaf.ndim < len(shape) or not isinstance(sharding, NamedSharding):
            continue
        if any(size not in (1, whole) for size, whole in zip(leaf.shape, shape, strict=False)):
            continue
        entries = spec_entries(sharding, len(shape))
        cut = [entry if size == whole else None for size, whole, entry in zip(leaf.shape, shape, entries, strict=False)]
        if leaf.ndim > len(shape):
            cut = _moved(leaf.shape, cut, [entry for entry in entries if entry not in cut], sharding)
        return NamedSharding(sharding.mesh, PartitionSpec(*cut)) if any(cut) else None
    return None


def _moved(shape: Sequence[int], cut: list[Any], dropped: list[Any], sharding: NamedSharding) -> list[Any]:
    """Mesh axes of which a factor lacks the array axis go to one that it has: it would lie whole on every device."""
    for entry in dropped:
        free = (axis for axis, known in enumerate(cut) if known is None and shape[axis] % ways(sharding, entry) == 0)
        if (axis := next(free, None)) is not None:
            cut[axis] = entry
    return cut


def _sharding_of(leaf: Any) -> NamedSharding | None:
    """Of a compressed leaf as a whole: that of its largest part with its axes."""
    parts = [part for part in jax.tree.leaves(leaf) if part.ndim == leaf.ndim]
    largest = max(parts, key=lambda part: part.size, default=None)
    return largest.sharding if largest is not None and isinstance(largest.sharding, NamedSharding) else None


def _alike(leaf: jax.Array, before: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """`leaf`, sharded as another array: a step that moved its state would be compiled once more."""
    if not is_traced(leaf) or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    explicit = jax.typeof(before).sharding
    if jax.sharding.AxisType.Explicit in explicit.mesh.axis_types:
        return jax.sharding.reshard(leaf, explicit)
    # Not `shard_alike`: JAX lowers it once for each shape, so that all leaves of one shape would get one sharding.
    return leaf if sharding is None else jax.lax.with_sharding_constraint(leaf, sharding)


def _never(_: Any) -> bool:
    return False
