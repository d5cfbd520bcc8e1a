"""Models as jaxprs over the arrays of their arguments; whatever else these hold (flags, functions, None) is static."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxcompress._src.meshes import abstract
from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.types import Params, is_compressed


class Static(NamedTuple):
    """A tree without its arrays; hashable where what is left is.

    Attributes:
        treedef: its structure.
        leaves: its leaves, None in the place of arrays.
        numbers: of the leaves that are arrays.
    """

    treedef: Any
    leaves: tuple[Any, ...]
    numbers: tuple[int, ...]

    @property
    def is_empty(self) -> bool:
        """Whether the tree is of arrays alone."""
        return len(self.numbers) == len(self.leaves)

    def filled(self, arrays: Sequence[Any]) -> Any:
        """The tree with arrays in their places."""
        leaves = list(self.leaves)
        for number, array in zip(self.numbers, arrays, strict=True):
            leaves[number] = array
        return self.treedef.unflatten(leaves)


def split_arrays(tree: Any, *, is_leaf: Callable[[Any], bool] = is_compressed) -> tuple[list[Any], Static]:
    """The arrays of a tree, and the rest. Compressed arrays are arrays.

    Example:
        >>> arrays, static = split_arrays({"flag": True, "w": jax.numpy.ones(2)})
        >>> static.filled([2 * arrays[0]])
        {'flag': True, 'w': Array([2., 2.], dtype=float32)}
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_leaf)
    numbers = tuple(number for number, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype"))
    arrays = [leaves[number] for number in numbers]
    for number in numbers:
        leaves[number] = None
    return arrays, Static(treedef, tuple(leaves), numbers)


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """A model as a jaxpr.

    Attributes:
        closed: the jaxpr; it takes the leaves of the params, then those of the inputs.
        outputs: structure of the outputs.
        params: the tree; whatever else is in it is static.
        leaves: its arrays, perhaps compressed or abstract.
        numbers: of these among all leaves.
        values: the arrays of the inputs.
    """

    closed: Any
    outputs: Any
    params: Params
    leaves: list[Any]
    numbers: tuple[int, ...]
    values: list[Any]

    @property
    def paths(self) -> list[str]:
        """Of the leaves."""
        paths = [path for path, _ in leaves_with_paths(self.params, is_leaf=is_compressed)]
        return [paths[number] for number in self.numbers]


def traced(apply: Callable[..., Any], params: Params, inputs: Sequence[Any]) -> Traced:
    """Traces a model; compressed leaves count as the arrays they stand for.

    Args:
        apply: `(params, *inputs) -> outputs`, pure.
        params: arrays, compressed arrays or `jax.ShapeDtypeStruct`, among others.
        inputs: trees of arrays or of `jax.ShapeDtypeStruct`, among others.

    Example:
        >>> params, x = {"w": jax.numpy.ones((2, 3))}, jax.numpy.ones((1, 2))
        >>> model = traced(lambda p, x, flag: x @ p["w"] if flag else x, params, (x, True))
        >>> len(model.closed.jaxpr.invars), model.paths
        (2, ['w'])
    """
    leaves, static = split_arrays(params)
    values, static_inputs = split_arrays(tuple(inputs))

    def run(leaves: list[Any], values: list[Any]) -> Any:
        return apply(static.filled(leaves), *static_inputs.filled(values))

    logical = [abstract(leaf) if is_compressed(leaf) else leaf for leaf in leaves]
    if static.is_empty and static_inputs.is_empty:
        # JAX remembers what it traced of a function; of a new one it could not.
        closed, shapes = jax.make_jaxpr(apply, return_shape=True)(static.filled(logical), *inputs)
    else:
        closed, shapes = jax.make_jaxpr(run, return_shape=True)(logical, values)
    return Traced(closed, jax.tree.structure(shapes), params, leaves, static.numbers, values)
