"""An ONNX graph while it is built: nodes in nested scopes, constants, and tensors that are not yet broadcast."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress._src.export.onnx.constants import Constants
from jaxcompress._src.export.onnx.dimensions import Dimensions, Shape, broadcast, is_static
from jaxcompress._src.export.onnx.types import carrier, onnx_type, selectable

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A value of the graph.

    bfloat16 values travel as float32 that bfloat16 holds exactly, since ONNX Runtime has next to no kernels of it.

    Attributes:
        name: of the graph's value.
        held: its shape, which has 1 on axes that are only broadcast.
        shape: that of the JAX value.
        dtype: that of the JAX value.
    """

    name: str
    held: Shape
    shape: Shape
    dtype: np.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)


@dataclasses.dataclass(frozen=True)
class Body:
    """A graph inside a node: of a loop or a branch. It sees all values of the graphs around it.

    Attributes:
        inputs: (name, dtype, number of axes) of each.
        outputs: the same.
        nodes: in order.
    """

    inputs: tuple[tuple[str, np.dtype, int], ...]
    outputs: tuple[tuple[str, np.dtype, int], ...]
    nodes: tuple["Node", ...]


@dataclasses.dataclass(frozen=True)
class Node:
    """An operator; attributes may be numbers, lists of them, strings or a `Body`."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    domain: str
    attributes: dict[str, Any]

    @property
    def bodies(self) -> tuple[Body, ...]:
        """The graphs inside."""
        return tuple(value for value in self.attributes.values() if isinstance(value, Body))


@dataclasses.dataclass
class _Scope:
    nodes: list[Node] = dataclasses.field(default_factory=list)
    memo: dict[Any, tuple[str, ...]] = dataclasses.field(default_factory=dict)


class Graph:
    """Builds nodes; the same operator on the same inputs is made once.

    Args:
        taken: names that are others'.
    """

    def __init__(self, taken: Sequence[str] = ()) -> None:
        self._taken = frozenset(taken)
        self.constants = Constants(self.fresh)
        self.dimensions = Dimensions(self)
        self._count = 0
        self._scopes = [_Scope()]

    @property
    def nodes(self) -> list[Node]:
        """Those of the outermost graph."""
        return self._scopes[0].nodes

    def fresh(self) -> str:
        """A name that nothing has."""
        self._count += 1
        name = f"v{self._count}"
        return self.fresh() if name in self._taken else name

    def op(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """The output of an operator that has one."""
        return self.ops(op, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(self, op: str, *inputs: str, outputs: int, domain: str = "", **attributes: Any) -> tuple[str, ...]:
        """The outputs of an operator. The name "" is an input that is left out."""
        key = None
        if not any(isinstance(value, Body) for value in attributes.values()):
            listed = {name: tuple(v) if isinstance(v, list) else v for name, v in attributes.items()}
            key = (op, inputs, outputs, domain, tuple(sorted(listed.items())))
            for scope in self._scopes:
                if key in scope.memo:
                    return scope.memo[key]
        names = tuple(self.fresh() for _ in range(outputs))
        self._scopes[-1].nodes.append(Node(op, inputs, names, domain, attributes))
        if key is not None:
            self._scopes[-1].memo[key] = names
        return names

    def fresh_identity(self, name: str) -> str:
        """The same value as one of the graph at hand: what comes out of a graph must be made in it."""
        return self.named_identity(name, self.fresh())

    def named_identity(self, name: str, new: str) -> str:
        """The same value under a name of its own."""
        self._scopes[-1].nodes.append(Node("Identity", (name,), (new,), "", {}))
        return new

    @contextlib.contextmanager
    def outermost(self) -> Iterator[None]:
        """Nodes go to the outermost graph, where every other one sees their values."""
        inner = self._scopes[1:]
        del self._scopes[1:]
        try:
            yield
        finally:
            self._scopes.extend(inner)

    @contextlib.contextmanager
    def scope(self) -> Iterator[list[Node]]:
        """Nodes go to a graph of their own; gives its list."""
        self._scopes.append(_Scope())
        try:
            yield self._scopes[-1].nodes
        finally:
            self._scopes.pop()

    def constant(self, array: Any) -> str:
        """The name of a constant, as it is carried: bfloat16 stays bfloat16 in the file."""
        array = np.asarray(array)
        name = self.constants.add(array)
        if array.dtype == jnp.bfloat16:
            with self.outermost():
                return self.op("Cast", name, to=onnx_type(np.float32))
        return name

    def ints(self, *values: int) -> str:
        """A constant list of int64."""
        return self.constant(np.asarray(values, np.int64))

    def scalar(self, value: Any, dtype: Any) -> str:
        """A constant number of the type that carries `dtype`."""
        return self.constant(np.asarray(value, carrier(dtype)))

    def tensor(self, value: Any) -> Tensor:
        """A value as a tensor; of a constant, axes that are only broadcast are kept as 1."""
        if isinstance(value, Tensor):
            return value
        array = np.asarray(value)
        shape = array.shape
        sizes = zip(shape, array.strides, strict=True)
        array = array[tuple(slice(0, 1) if n > 1 and stride == 0 else slice(None) for n, stride in sizes)]
        if array.size > 1 and (array == array[(0,) * array.ndim]).all():
            array = array[(slice(0, 1),) * array.ndim]
        return Tensor(self.constant(array), array.shape, shape, array.dtype)

    def full(self, value: Any) -> Tensor:
        """A tensor that is held in its whole shape."""
        tensor = self.tensor(value)
        if same_shape(tensor.held, tensor.shape):
            return tensor
        name = self.op("Expand", tensor.name, self.shape(tensor.shape))
        return dataclasses.replace(tensor, name=name, held=tensor.shape)

    def new(self, name: str, like: Any) -> Tensor:
        """A tensor of the shape and dtype of an abstract value."""
        return Tensor(name, tuple(like.shape), tuple(like.shape), np.dtype(like.dtype))

    def shape(self, dims: Sequence[Any]) -> str:
        """The name of a list of sizes."""
        return self.dimensions.shape(dims)

    def cast(self, name: str, source: Any, target: Any) -> str:
        """From the carrier of one dtype to that of another."""
        if carrier(source) == carrier(target):
            return name
        return self.op("Cast", name, to=onnx_type(carrier(target)))

    def rounded(self, name: str, dtype: Any) -> str:
        """What arithmetic gave, as `dtype` holds it: rounds what is carried in float32."""
        if np.dtype(dtype) != jnp.bfloat16:
            return name
        return self.op("Cast", self.op("Cast", name, to=onnx_type(dtype)), to=onnx_type(np.float32))

    def chosen(self, flag: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """`first` where a flag is set, else `second`, as they are held."""
        own, computed = carrier(first.dtype), selectable(first.dtype)
        name = self.op("Where", flag.name, *(self.cast(x.name, own, computed) for x in (first, second)))
        held = held_shape([flag, first, second])
        return Tensor(self.cast(name, computed, own), held, first.shape, first.dtype)

    def reshape(self, value: Any, shape: Shape) -> Tensor:
        """A tensor in another shape; axes of size 1 come and go without a broadcast being written."""
        tensor = self.tensor(value)
        if same_shape(tensor.shape, shape):
            return tensor
        held = _held_after(tensor, shape)
        if held is None:
            tensor, held = self.full(tensor), shape
        target = self.dimensions.reshape_target(tensor.held, held)
        # Without the attribute, 0 says that a size stays as it is.
        is_empty = any(is_static(size) and size == 0 for size in held)
        name = (
            self.op("Reshape", tensor.name, target, allowzero=1)
            if is_empty
            else self.op("Reshape", tensor.name, target)
        )
        return Tensor(name, held, shape, tensor.dtype)

    def transpose(self, value: Any, permutation: Sequence[int]) -> Tensor:
        """A tensor with its axes in another order."""
        tensor = self.tensor(value)
        if tuple(permutation) == tuple(range(tensor.ndim)):
            return tensor
        assert sorted(permutation) == list(range(tensor.ndim)), f"{permutation} of {tensor.ndim} axes"
        held, shape = (tuple(dims[axis] for axis in permutation) for dims in (tensor.held, tensor.shape))
        moved = [axis for axis in permutation if is_static(tensor.held[axis]) is False or tensor.held[axis] != 1]
        if moved == sorted(moved):
            # Only axes of size 1 move.
            name = self.op("Reshape", tensor.name, self.dimensions.reshape_target(tensor.held, held))
        else:
            name = self.op("Transpose", tensor.name, perm=list(permutation))
        return Tensor(name, held, shape, tensor.dtype)


def same_shape(first: Shape, second: Shape) -> bool:
    """Whether two shapes are equal, symbols included."""
    return len(first) == len(second) and all(a is b or a == b for a, b in zip(first, second, strict=True))


def held_shape(tensors: Sequence[Tensor]) -> Shape:
    """The shape that elementwise arithmetic on what is held gives."""
    return functools.reduce(broadcast, (tensor.held for tensor in tensors))


def _held_after(tensor: Tensor, shape: Shape) -> Shape | None:
    """The held shape after a reshape that only adds or drops axes of size 1; None for any other one."""
    old = [(n, h) for n, h in zip(tensor.shape, tensor.held, strict=True) if not (is_static(n) and n == 1)]
    new = [n for n in shape if not (is_static(n) and n == 1)]
    if not same_shape(tuple(n for n, _ in old), tuple(new)):
        return None
    held = iter(h for _, h in old)
    return tuple(1 if is_static(n) and n == 1 else next(held) for n in shape)
