"""Arrays on meshes with Explicit axes, the default of `jax.make_mesh`.

There the sharding is part of an array's type, and many operations (a reshape that splits a sharded axis, a product
that sums over one) want to be told how their output is sharded. What this library computes asks for no particular
sharding, so it runs on the Auto version of the same mesh, which shares the buffers, and hands its results back as
arrays of the Explicit mesh. A user's own functions always see the mesh that they were written for.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax import core
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, reshard

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T", bound=Any)


def on_auto_axes(fn: Callable[P, R]) -> Callable[P, R]:
    """`fn`, able to take arrays on meshes with Explicit axes.

    Outside of `jit`, arrays are relabelled without a copy, and results keep the sharding that they came with. Inside,
    where a result must be told its sharding, it takes that of the argument with the same shape (of several, the one
    whose path has most in common), or else of one with as many axes, where they divide; or else it is replicated.

    Args:
        fn: of trees of arrays; it must not call functions that rely on Explicit axes.

    Returns:
        The same function; without arrays on Explicit axes it is called as it is.

    Example:
        >>> import jax.numpy as jnp
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> x = jax.device_put(jnp.ones((4, 2)), NamedSharding(mesh, PartitionSpec("data")))
        >>> on_auto_axes(lambda x: x.reshape(2, 2, 2).sum(axis=1))(x).tolist()
        [[2.0, 2.0], [2.0, 2.0]]
    """
    call: Any = fn

    @functools.wraps(fn)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        leaves, treedef = jax.tree.flatten((args, kwargs))
        mesh = explicit_mesh(leaves)
        if mesh is None:
            return fn(*args, **kwargs)
        if any(isinstance(leaf, core.Tracer) for leaf in leaves):
            leaves = [_onto(mesh, leaf) for leaf in leaves]
            with jax.sharding.use_abstract_mesh(_auto_axes(mesh)):
                plain_args, plain_kwargs = treedef.unflatten(map(_entering, leaves))
                results = call(*plain_args, **plain_kwargs)
            return _leaving(results, _shardings(results, (args, kwargs), mesh))
        relabelled = [_relabelled(leaf) for leaf in leaves]
        plain_args, plain_kwargs = treedef.unflatten(relabelled)
        with _context():
            results = call(*plain_args, **plain_kwargs)
        pairs = [pair for pair in zip(relabelled, leaves, strict=True) if pair[0] is not pair[1]]
        meshes = {auto.sharding.mesh: leaf.sharding.mesh for auto, leaf in pairs}
        originals = {id(auto): leaf for auto, leaf in pairs}
        return jax.tree.map(functools.partial(_back, originals, meshes), results)

    return run


def transform_on_auto_axes(factory: Callable[P, T]) -> Callable[P, T]:
    """A maker of transforms, whose functions then take arrays on meshes with Explicit axes.

    Args:
        factory: returns a `Transform` whose functions may be called as `on_auto_axes` asks.

    Returns:
        The same maker.
    """

    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> T:
        transform = factory(*args, **kwargs)
        names = ("init", "apply", "penalty", "update", "project", "finalize")
        return transform._replace(**{name: on_auto_axes(getattr(transform, name)) for name in names})

    return make


def on_auto_axes_as(shardings: Sequence[NamedSharding], fn: Callable[..., R], *args: Any) -> R:
    """`fn(*args)`, computed on Auto axes, with outputs of given shardings.

    Args:
        shardings: one for each array that comes out, of a mesh with axes of either type. Arrays without an entry are
            replicated if the mesh has Explicit axes, and otherwise as the compiler has it.
        fn: as for `on_auto_axes`.
        *args: of `fn`.

    Returns:
        The outputs.

    Example:
        >>> on_auto_axes_as([], lambda x: x + 1, jax.numpy.zeros(1)).tolist()
        [1.0]
    """
    mesh = explicit_mesh(args)
    if mesh is None:
        leaves, treedef = jax.tree.flatten(fn(*args))
        constrained = map(jax.lax.with_sharding_constraint, leaves, shardings)
        return treedef.unflatten([*constrained, *leaves[len(shardings) :]])
    with jax.sharding.use_abstract_mesh(_auto_axes(mesh)):
        results = fn(*jax.tree.map(_entering, args))
    whole = [NamedSharding(mesh, PartitionSpec(*[None] * leaf.ndim)) for leaf in jax.tree.leaves(results)]
    return _leaving(results, [*shardings, *whole[len(shardings) :]])


def as_typed(value: Any, aval: Any) -> Any:
    """A value with the sharding that a trace on a mesh with Explicit axes expects.

    Args:
        value: an array, or a compressed array, whose parts take the entries that divide them. What is on no such mesh
            stays as it is.
        aval: from the trace.

    Example:
        >>> as_typed(jax.numpy.ones(1), jax.typeof(jax.numpy.ones(1))).tolist()
        [1.0]
    """
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return value

    def place(part: Any) -> Any:
        if _mesh_of(part) is None:
            return part
        entries = aval.sharding.spec if part.ndim == len(aval.shape) else ()
        sharding = _fitted(mesh, entries, part.shape)
        return part if jax.typeof(part).sharding == sharding else reshard(part, sharding)

    return jax.tree.map(place, value)


def replicated_beside(tree: Any, others: Any) -> Any:
    """A tree of arrays, replicated on the Explicit mesh of other arrays; without one it stays as it is.

    Example:
        >>> replicated_beside([1.0], [jax.numpy.ones(2)])
        [1.0]
    """
    mesh = explicit_mesh(others)
    if mesh is None:
        return tree
    concrete = next((own for leaf in jax.tree.leaves(others) if (own := _concrete_mesh(leaf)) is not None), None)

    def place(leaf: Any) -> Any:
        spec = PartitionSpec(*[None] * leaf.ndim)
        if concrete is None or isinstance(leaf, core.Tracer):
            return reshard(leaf, NamedSharding(mesh, spec))
        return jax.device_put(leaf, NamedSharding(concrete, spec))

    return jax.tree.map(place, tree)


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a leaf, and on a mesh with Explicit axes its sharding: what a model may be traced with.

    Args:
        leaf: an array, `jax.ShapeDtypeStruct`, or a compressed array, whose sharding is that of its largest part with
            as many axes, where they divide.

    Example:
        >>> abstract(jax.numpy.ones((2, 3)))
        ShapeDtypeStruct(shape=(2, 3), dtype=float32)
    """
    mesh = explicit_mesh(leaf)
    if mesh is None:
        axes = varying_axes(leaf)
        if not axes:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        part = jax.typeof(jax.tree.leaves(leaf)[0])
        replicated = NamedSharding(part.sharding.mesh, PartitionSpec(*[None] * len(leaf.shape)))
        manual = part.mat.update(varying=axes)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated, manual_axis_type=manual)
    parts = [part for part in jax.tree.leaves(leaf) if part.ndim == len(leaf.shape) and _mesh_of(part) is not None]
    spec = jax.typeof(max(parts, key=lambda part: part.size)).sharding.spec if parts else PartitionSpec()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_fitted(mesh, spec, leaf.shape))


def varying_axes(tree: Any) -> frozenset[str]:
    """The axes of a mesh along which any of these arrays varies, within `jax.shard_map`."""
    return frozenset().union(
        *(jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(tree) if isinstance(leaf, core.Tracer))
    )


def varying(tree: T, axes: Iterable[str]) -> T:
    """The same arrays, which may vary along these axes of a mesh too, within `jax.shard_map`."""

    def cast(leaf: Any) -> Any:
        new = tuple(axis for axis in axes if axis not in varying_axes(leaf))
        return jax.lax.pcast(leaf, new, to="varying") if new else leaf

    return jax.tree.map(cast, tree)


def shared_mesh(tree: Any) -> Mesh | None:
    """The mesh of the first array of a tree that is on one; None without one, and of what is being traced.

    Example:
        >>> shared_mesh({"w": jax.numpy.ones(3)}) is None
        True
    """
    return next((mesh for leaf in jax.tree.leaves(tree) if (mesh := _any_mesh_of(leaf)) is not None), None)


def on_whole_mesh(array: jax.Array, other: Any) -> jax.Array:
    """An array, replicated on the mesh of another one, perhaps a compressed one; without a mesh it stays as it is.

    Example:
        >>> on_whole_mesh(jax.numpy.ones(1), jax.numpy.ones(2)).tolist()
        [1.0]
    """
    mesh = shared_mesh(other)
    return array if mesh is None else jax.device_put(array, NamedSharding(mesh, PartitionSpec()))


def to_host(array: Any) -> np.ndarray:
    """The whole array, in every process, whatever its sharding."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def gathered(array: Any) -> Any:
    """An array on devices of several processes as one of this process alone; any other one as it is.

    Example:
        >>> gathered(jax.numpy.ones(2)).tolist()
        [1.0, 1.0]
    """
    return array if getattr(array, "is_fully_addressable", True) else jax.numpy.asarray(to_host(array))


def spread(mesh: Mesh, shape: Sequence[int], *, stack: int = 0) -> NamedSharding:
    """The sharding that cuts one axis of an array over as many devices as divide it.

    Args:
        mesh: of the devices.
        shape: of the array.
        stack: number of its first axes that stay whole.

    Returns:
        Of the axes that can be cut as often, the first one is; an array that no device count divides is replicated.

    Example:
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> spread(mesh, (3, 8, 8), stack=1).spec
        P(None, 'data', None)
    """
    cuts = {axis: _dividing_axes(mesh, shape[axis]) for axis in range(stack, len(shape))}
    most = max(cuts, key=lambda axis: _ways(mesh, cuts[axis]), default=None)
    return NamedSharding(
        mesh, PartitionSpec(*[cuts[axis] or None if axis == most else None for axis in range(len(shape))])
    )


def sharded_like(new: Any, old: Any) -> Any:
    """A leaf, with the sharding of the one that it replaces.

    Args:
        new: a plain or compressed array; each part with the axes of the leaf takes the entries that divide it (a group
            of weights that share a scale may lie on several devices), and any other part is replicated.
        old: an array of the same shape. If it is on no mesh, but `new` is, that becomes replicated.

    Example:
        >>> sharded_like(jax.numpy.ones(2), jax.numpy.zeros(2)).tolist()
        [1.0, 1.0]
    """
    mesh = shared_mesh((old, new))
    if mesh is None:
        return new
    spec = old.sharding.spec if _any_mesh_of(old) is not None else PartitionSpec()

    def place(part: Any) -> Any:
        entries = spec if part.ndim == len(new.shape) else PartitionSpec()
        return jax.device_put(part, _fitted(mesh, entries, part.shape))

    return jax.tree.map(place, new)


def explicit_mesh(tree: Any) -> AbstractMesh | None:
    """The mesh of the first array of a tree that has Explicit axes; None without one.

    Example:
        >>> explicit_mesh({"w": jax.numpy.ones(3)}) is None
        True
    """
    return next((mesh for leaf in jax.tree.leaves(tree) if (mesh := _mesh_of(leaf)) is not None), None)


def _mesh_of(leaf: Any) -> AbstractMesh | None:
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return None
    sharding = getattr(jax.typeof(leaf), "sharding", None) if isinstance(leaf, jax.Array) else leaf.sharding
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return None
    return mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh


def _any_mesh_of(leaf: Any) -> Mesh | None:
    if not isinstance(leaf, jax.Array) or isinstance(leaf, core.Tracer) or not isinstance(leaf.sharding, NamedSharding):
        return None
    return leaf.sharding.mesh if isinstance(leaf.sharding.mesh, Mesh) else None


def _concrete_mesh(leaf: Any) -> Mesh | None:
    if _mesh_of(leaf) is None or isinstance(leaf, core.Tracer):
        return None
    return leaf.sharding.mesh if isinstance(leaf.sharding.mesh, Mesh) else None


def _auto_axes(mesh: AbstractMesh) -> AbstractMesh:
    explicit = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return mesh.update_axis_types({name: AxisType.Auto for name, kind in explicit if kind == AxisType.Explicit})


def _onto(mesh: AbstractMesh, leaf: Any) -> Any:
    """A traced array on no mesh, replicated: its derivatives would come back on Auto axes."""
    if not isinstance(leaf, core.Tracer) or not jax.typeof(leaf).sharding.mesh.empty:
        return leaf
    return reshard(leaf, NamedSharding(mesh, PartitionSpec(*[None] * leaf.ndim)))


def _entering(leaf: Any) -> Any:
    """Inside of a trace: no constraint on the way in."""
    return leaf if _mesh_of(leaf) is None else reshard(leaf, PartitionSpec(*[None] * leaf.ndim))


def _leaving(results: Any, shardings: Any) -> Any:
    def leave(leaf: Any, sharding: Any) -> Any:
        if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types or not isinstance(leaf, jax.Array):
            return leaf
        return reshard(leaf, sharding)

    leaves, treedef = jax.tree.flatten(results)
    flat = jax.tree.leaves(shardings, is_leaf=lambda each: each is None)
    return treedef.unflatten([leave(leaf, sharding) for leaf, sharding in zip(leaves, flat, strict=True)])


def _relabelled(leaf: Any) -> Any:
    """Outside of a trace: the same buffers on the Auto version of the mesh."""
    if _mesh_of(leaf) is None:
        return leaf
    sharding = leaf.sharding
    mesh = sharding.mesh
    kinds = tuple(AxisType.Auto if kind == AxisType.Explicit else kind for kind in mesh.axis_types)
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)
    return jax.device_put(leaf, NamedSharding(auto, sharding.spec, memory_kind=sharding.memory_kind))


def _back(originals: dict[int, Any], meshes: dict[Mesh, Mesh], leaf: Any) -> Any:
    if id(leaf) in originals:
        return originals[id(leaf)]
    sharding = leaf.sharding if isinstance(leaf, jax.Array) and not isinstance(leaf, core.Tracer) else None
    if not isinstance(sharding, NamedSharding) or sharding.mesh not in meshes:
        return leaf
    explicit = NamedSharding(meshes[sharding.mesh], sharding.spec, memory_kind=sharding.memory_kind)
    return jax.device_put(leaf, explicit)


def _context() -> AbstractContextManager[Any]:
    """The Auto version of the mesh that `jax.set_mesh` has set, if any."""
    mesh = jax.sharding.get_abstract_mesh()
    explicit = not mesh.empty and AxisType.Explicit in mesh.axis_types
    return jax.sharding.use_abstract_mesh(_auto_axes(mesh)) if explicit else nullcontext()


def _shardings(results: Any, arguments: Any, mesh: AbstractMesh) -> list[NamedSharding | None]:
    """Of every result, from those of the arguments: of the same shape, or of as many axes."""
    by_shape: dict[Any, list[Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(arguments):
        if _mesh_of(leaf) is not None:
            given = frozenset(map(str, path)), leaf.shape, jax.typeof(leaf).sharding.spec
            by_shape.setdefault(leaf.shape, []).append(given)
            by_shape.setdefault(leaf.ndim, []).append(given)

    def of(path: Any, leaf: Any) -> NamedSharding | None:
        if not isinstance(leaf, jax.Array):
            return None
        alike = by_shape.get(leaf.shape) or by_shape.get(leaf.ndim)
        if alike is None:
            return NamedSharding(mesh, PartitionSpec(*[None] * leaf.ndim))
        keys = frozenset(map(str, path))
        spec = max(alike, key=lambda each: (len(each[0] & keys), math.prod(each[1])))[2]
        return _fitted(mesh, spec, leaf.shape)

    return [of(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(results)]


def _fitted(mesh: AbstractMesh | Mesh, spec: Any, shape: Sequence[int]) -> NamedSharding:
    """A sharding of an array, without the entries that do not divide it."""
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    entries = itertools.islice(itertools.chain(spec, itertools.repeat(None)), len(shape))
    kept = [_dividing(entry, size, sizes) for entry, size in zip(entries, shape, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*kept))


def _dividing(entry: Any, size: int, sizes: dict[str, int]) -> Any:
    ways = 1
    for name in entry if isinstance(entry, tuple) else () if entry is None else (entry,):
        ways *= sizes[name]
    return entry if size % ways == 0 else None


def _dividing_axes(mesh: Mesh, size: int) -> tuple[str, ...]:
    """As many axes of a mesh as divide an axis of an array, one after another."""
    names: tuple[str, ...] = ()
    for name in mesh.axis_names:
        if size and size % _ways(mesh, (*names, name)) == 0:
            names = (*names, name)
    return names


def _ways(mesh: Mesh, names: Sequence[str]) -> int:
    return math.prod(mesh.shape[name] for name in names)
