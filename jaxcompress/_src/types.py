"""What every package agrees on: names of types, the contract of a transform, what counts as compressed."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeGuard, TypeVar, runtime_checkable

import jax
import jax.export
from jax.typing import ArrayLike

_Node = TypeVar("_Node", bound=type)

Params: TypeAlias = Any
"""A tree of parameters: nested dicts, FrozenDict, NNX state, an Equinox module."""

Selector: TypeAlias = Callable[[Params], Any]
"""`params -> tree of bool` of the same structure; True marks the leaves to act on."""

Schedule: TypeAlias = Callable[[ArrayLike], jax.Array]
"""`step -> scalar`; pure, traceable, so that a schedule never retraces."""


@runtime_checkable
class CompressedArray(Protocol):
    """A leaf that stores a logical array in fewer bits.

    It is a pytree node whose leading, stacked axes come from its data, so that `scan`, `vmap` and slicing act on it as
    on an array. `arrays/protocol.py` says what else a kind may have.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape: that of the array it stands for."""
        ...

    @property
    def dtype(self) -> Any:
        """Logical dtype: that of the array it stands for."""
        ...

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        ...

    @property
    def size(self) -> int:
        """Number of logical entries."""
        ...

    @property
    def nbits(self) -> int:
        """Bits that are really stored: codes, scales, indices, masks."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that are really stored: `nbits / 8`, whole because every part is an array of bytes or more."""
        ...

    def materialize(self) -> jax.Array:
        """The plain array, of the logical shape and dtype."""
        ...


def is_compressed(leaf: Any) -> TypeGuard[CompressedArray]:
    """Whether `leaf` is a compressed array.

    Looks at the class alone: the children may be tracers, bools or sentinels while a tree is being mapped.
    """
    return hasattr(type(leaf), "materialize") and hasattr(type(leaf), "nbits")


def plain(leaf: Any) -> Any:
    """The array that a compressed leaf stands for; any other leaf as it is."""
    return leaf.materialize() if is_compressed(leaf) else leaf


def is_entry(leaf: Any) -> bool:
    """Whether `leaf` stands where a tree of parameters has one leaf, although JAX sees a tree.

    Those are compressed arrays, and what is known of a leaf: input statistics, whose classes say `is_entry = True`.
    """
    return is_compressed(leaf) or getattr(type(leaf), "is_entry", False)


def exportable(cls: _Node) -> _Node:
    """Class decorator: functions that take or return this node survive `jax.export(...).serialize()`.

    For named tuples, and for dataclasses registered with JAX whose fields are all children. The name in the artifact is
    `jaxcompress.` and that of the class. Reading it back needs `import jaxcompress`, and for states of transforms and
    statistics the module that they come from, such as `jaxcompress.pruning`.

    Example:
        >>> @exportable
        ... class Pair(NamedTuple):
        ...     first: jax.Array
        ...     second: jax.Array
        >>> exported = jax.export.export(jax.jit(lambda pair: pair.first))(Pair(jax.numpy.ones(2), jax.numpy.ones(1)))
        >>> jax.export.deserialize(exported.serialize()).in_tree == exported.in_tree
        True
    """
    name = f"jaxcompress.{cls.__name__}"
    if hasattr(cls, "_fields"):
        return jax.export.register_namedtuple_serialization(cls, serialized_name=name)
    # Not empty: JAX reads an empty vector back as 0.
    return jax.export.register_pytree_node_serialization(
        cls, serialized_name=name, serialize_auxdata=lambda _: b"[]", deserialize_auxdata=lambda _: ()
    )


@exportable
class TransformState(NamedTuple):
    """State of a `Transform`.

    Attributes:
        trainable: optimised together with the model: gate logits, learned step sizes, scores, multipliers.
        fixed: changed by `update` only: masks, counters, moving averages.
    """

    trainable: Any
    fixed: Any


class Transform(NamedTuple):
    """A compression technique during training, as six pure functions.

    One train step runs, in this order: `apply` inside the loss, backward, optimizer, `update`, `project`. All of it is
    traced once: what changes with time is an array of the state. `identity()._replace(...)` is a transform with some
    functions of its own.

    Leaves that are compressed before the training begins may be among those selected. Every function hands them on as
    they are, unless it is made for them, as rounding is for sparse leaves. What `finalize` stores has the values that
    `apply` returns, and what is zero in them stays zero through the stages after.

    Attributes:
        init: `(params, *, key, statistics=None) -> TransformState`, with strongly typed leaves; named tuples in it are
            `exportable`. `update` and `project` keep its structure, shapes and dtypes.
        apply: `(params, state, *, key=None) -> params` that the forward pass uses; differentiable; keeps the logical
            structure, shapes and dtypes. `key=None` is the deterministic form.
        penalty: `(state, params, *, loss) -> scalar` added to the loss.
        update: `(grads, state, params, *, key, loss) -> (state, fresh)`, once per optimizer step. `grads` are with
            respect to what this transform's `apply` returned (for a chain: one such tree per stage). `params` is this
            transform's deterministic input after the optimizer. `fresh` is `None` or a tree of bool: weights that
            start anew, whose optimizer moments the step zeroes.
        project: `(params, state) -> (params, state)`: constraints on raw values.
        finalize: `(params, state) -> params` with compressed or smaller leaves; outside `jit`; accepts leaves that an
            earlier stage compressed.
        stages: the parts of a chain, in order; empty for anything else.
        frozen: a selector of raw leaves that no optimizer may change, and that need no moments; None: there are none.
    """

    init: Callable[..., TransformState]
    apply: Callable[..., Params]
    penalty: Callable[..., Any]
    update: Callable[..., tuple[TransformState, Any]]
    project: Callable[..., tuple[Params, TransformState]]
    finalize: Callable[..., Params]
    stages: tuple["Transform", ...] = ()
    frozen: Selector | None = None
