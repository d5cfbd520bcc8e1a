"""A model whose stacked leaves are given entry by entry: the layers of its scans one after another."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.trace.walk import WRAPPERS, as_body, bind, called_body, walk
from jaxcompress._src.tree.maps import flatten_like, leaves_with_paths
from jaxcompress._src.tree.paths import entry_name
from jaxcompress._src.types import Params, is_compressed


class _Entries(tuple[Any, ...]):
    """A stack, as its entries along the first axis: arrays, or stacks themselves."""


def unstacked(apply: Callable[..., Any], params: Params) -> Callable[..., Any]:
    """The same model over a tree whose stacks are nested tuples of their entries.

    Scans over these stacks are unrolled, and what cuts one entry out gets it as it is; whatever else needs a stack
    gets it put together again.

    Args:
        apply: `(params, *inputs) -> outputs`, inputs and outputs of arrays.
        params: a tree of its structure.

    Returns:
        `(params, *inputs) -> outputs`, for params from `entries_of`.

    Example:
        >>> def apply(params, x):
        ...     return jax.lax.scan(lambda x, w: (x * w, None), x, params["w"])[0]
        >>> params = {"w": jnp.array([2.0, 3.0])}
        >>> by_entry = unstacked(apply, params)
        >>> by_entry(entries_of(params, {"w": 1}), jnp.ones(()))
        Array(6., dtype=float32)
        >>> [eqn.primitive.name for eqn in jax.make_jaxpr(by_entry)(entries_of(params, {"w": 1}), jnp.ones(())).eqns]
        ['mul', 'mul']
    """
    treedef = jax.tree.structure(params)

    def run(split: Params, *inputs: Any) -> Any:
        subtrees = flatten_like(treedef, split)
        values = [_wrapped(tree) for tree in subtrees]
        whole = treedef.unflatten([jax.eval_shape(stack_of, tree) for tree in subtrees])
        closed, outputs = jax.make_jaxpr(apply, return_shape=True)(whole, *inputs)
        results = walk(as_body(closed), [*values, *jax.tree.leaves(inputs)], visit)
        return jax.tree.structure(outputs).unflatten(_joined(result) for result in results)

    return run


@on_auto_axes
def entries_of(params: Params, stacks: Mapping[str, int]) -> Params:
    """`params` with nested tuples of entries in place of some stacks; compressed ones are cut part by part.

    Args:
        params: the tree.
        stacks: path -> how many leading axes are stacked.
    """

    def visit(keyed: tuple[str, Any]) -> Any:
        path, leaf = keyed
        return _cut(leaf, stacks.get(path, 0))

    treedef = jax.tree.structure(params, is_leaf=is_compressed)
    return treedef.unflatten(map(visit, leaves_with_paths(params)))


def entry_paths(params: Params, stacks: Mapping[str, int]) -> dict[str, str]:
    """Path in the tree from `entries_of` -> name of the entry, `path[i]` or `path[i,j]`, or the path of a whole leaf.

    Example:
        >>> entry_paths({"b": jnp.ones(2), "w": jnp.ones((2, 3))}, {"w": 1})
        {'b': 'b', 'w/0': 'w[0]', 'w/1': 'w[1]'}
    """
    found = {}
    for path, _ in leaves_with_paths(entries_of(params, stacks)):
        stack = next((own for own in stacks if path.startswith(f"{own}/")), None)
        index = [] if stack is None else map(int, path.removeprefix(f"{stack}/").split("/"))
        found[path] = entry_name(stack or path, *index)
    return found


@on_auto_axes
def stack_of(entries: Any) -> Any:
    """The leaf again, from nested tuples of its entries."""
    if not isinstance(entries, tuple):
        return entries
    return jax.tree.map(lambda *parts: jnp.stack(parts), *map(stack_of, entries))


def whole_stacks(params: Params, split: Params) -> Params:
    """The inverse of `entries_of`; `params` gives the structure."""
    treedef = jax.tree.structure(params, is_leaf=is_compressed)
    return treedef.unflatten(map(stack_of, flatten_like(treedef, split)))


def visit(eqn: Any, values: list[Any]) -> Sequence[Any]:
    """One equation, with stacks in place; calls that only wrap are inlined."""
    name = eqn.primitive.name
    if name in WRAPPERS and (body := called_body(eqn)) is not None:
        return walk(body, values, visit)
    first = values[0] if values else None
    if name == "concatenate" and eqn.params["dimension"] == 0 and any(isinstance(v, _Entries) for v in values):
        return [_Entries(entry for value, var in zip(values, eqn.invars, strict=True) for entry in _listed(value, var))]
    if name == "scan" and any(isinstance(value, _Entries) for value in values[_carried(eqn) :]):
        return _unrolled(eqn, values)
    if isinstance(first, _Entries) and (found := _taken(eqn, first)) is not None:
        return [found]
    return bind(eqn, [_joined(value) for value in values])


def _carried(eqn: Any) -> int:
    return eqn.params["num_consts"] + eqn.params["num_carry"]


def _unrolled(eqn: Any, values: list[Any]) -> Sequence[Any]:
    length, begin, end = eqn.params["length"], eqn.params["num_consts"], _carried(eqn)
    consts, carry, stacks = values[:begin], values[begin:end], values[end:]
    written: dict[int, Sequence[Any]] = {}
    for i in reversed(range(length)) if eqn.params["reverse"] else range(length):
        results = walk(as_body(eqn.params["jaxpr"]), [*consts, *carry, *(_at(stack, i) for stack in stacks)], visit)
        carry, written[i] = results[: len(carry)], results[len(carry) :]
    columns = zip(*(written[i] for i in range(length)), strict=True)
    return [*carry, *(_joined(_Entries(column)) for column in columns)]


def _taken(eqn: Any, stack: _Entries) -> Any:
    """The stack, or the entry, that an equation makes of a stack; None where it makes something else."""
    name, params = eqn.primitive.name, eqn.params
    if name == "convert_element_type":
        return _mapped(lambda entry: bind(eqn, [entry])[0], stack)
    if name == "slice" and params["strides"] is None:
        shape, begins, ends = eqn.invars[0].aval.shape, params["start_indices"], params["limit_indices"]
        whole = all(
            begin == 0 and end == size for begin, end, size in zip(begins[1:], ends[1:], shape[1:], strict=True)
        )
        if whole and begins[0] < ends[0]:
            return _Entries(stack[begins[0] : ends[0]])
    if name == "rev" and tuple(params["dimensions"]) == (0,):
        return _Entries(reversed(stack))
    if name == "squeeze" and params["dimensions"] == (0,):
        return stack[0]
    return None


def _mapped(fn: Callable[[Any], Any], value: Any) -> Any:
    return _Entries(_mapped(fn, entry) for entry in value) if isinstance(value, _Entries) else fn(value)


def _listed(value: Any, var: Any) -> list[Any]:
    return [_at(value, i) for i in range(var.aval.shape[0])]


def _at(value: Any, index: int) -> Any:
    return value[index] if isinstance(value, _Entries) else jax.lax.index_in_dim(value, index, keepdims=False)


def _joined(value: Any) -> Any:
    return jnp.stack([_joined(entry) for entry in value]) if isinstance(value, _Entries) else value


def _wrapped(tree: Any) -> Any:
    return _Entries(map(_wrapped, tree)) if isinstance(tree, tuple) else tree


def _cut(leaf: Any, depth: int) -> Any:
    if not depth:
        return leaf
    count = jax.tree.leaves(leaf)[0].shape[0]
    return tuple(_cut(jax.tree.map(lambda part, i=i: part[i], leaf), depth - 1) for i in range(count))
