"""The units of layers in a row: input features, neurons, channels."""

import itertools
from collections.abc import Sequence

from jaxcompress._src.types import Params
from jaxcompress._src.units.group import UnitGroup, UnitSlices, leaf_shapes


def layer_units(params: Params, kernels: Sequence[str], *, inputs: bool = True) -> tuple[UnitGroup, ...]:
    """Unit groups of dense and convolutional layers that follow one another.

    Between two layers, a unit is an output of the first: its part of the kernel and of the bias, and what reads it in
    the second, which the gate multiplies. Kernels are (in, out) and (height, width, in, out). Where a dense layer
    follows a convolution, its inputs are positions x channels, as flattening (height, width, channel) leaves them.

    Args:
        params: gives the shapes. A bias is the leaf `bias` beside the kernel, if there is one.
        kernels: paths in the order of execution, such as `["first/kernel", "second/kernel"]`. What lies between two
            layers must act on every unit alone and keep zeros: activations like ReLU, pooling.
        inputs: also a group of the input features (or channels) of the first layer.

    Returns:
        Groups called `inputs` (of kind "inputs"), and as the kernels whose outputs they are (of kind "neurons", or
        "channels").

    Raises:
        ValueError: no kernel, one that does not exist or has neither two nor four axes, or widths that do not follow
            from one another.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"a": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, "b": {"kernel": jnp.ones((3, 2))}}
        >>> [(group.name, group.kind, group.count) for group in layer_units(params, ["a/kernel", "b/kernel"])]
        [('inputs', 'inputs', 4), ('a/kernel', 'neurons', 3)]
    """
    shapes = leaf_shapes(params)
    if not kernels:
        raise ValueError("`kernels` is empty.")
    for path in kernels:
        if len(shapes.get(path, ())) not in (2, 4):
            listed = "".join(f"\n  {name} {shape}" for name, shape in shapes.items())
            raise ValueError(f"{path!r} is no kernel of two or four axes. The leaves are:{listed or ' none'}")
    groups = []
    if inputs:
        axis = len(shapes[kernels[0]]) - 2
        part = UnitSlices(path=kernels[0], axis=axis, gated=True)
        groups.append(UnitGroup(name="inputs", kind="inputs", count=shapes[kernels[0]][axis], slices=(part,)))
    for path, reader in itertools.pairwise(kernels):
        groups.append(_between(path, reader, shapes))
    return tuple(groups)


def _between(path: str, reader: str, shapes: dict[str, tuple[int, ...]]) -> UnitGroup:
    count, read = shapes[path][-1], shapes[reader][-2]
    flattened = len(shapes[path]) == 4 and len(shapes[reader]) == 2
    if count == 0 or (read % count if flattened else read != count):
        raise ValueError(f"{reader!r} reads {read} features, and {path!r} has {count} outputs.")
    bias = path.rpartition("/")[0] + "/bias" if "/" in path else "bias"
    slices = [UnitSlices(path=path, axis=len(shapes[path]) - 1)]
    if shapes.get(bias) == (count,):
        slices.append(UnitSlices(path=bias, axis=0))
    slices.append(UnitSlices(path=reader, axis=len(shapes[reader]) - 2, repeat=read // count, gated=True))
    kind = "channels" if len(shapes[path]) == 4 else "neurons"
    return UnitGroup(name=path, kind=kind, count=count, slices=tuple(slices))
