"""What the interpreter carries, and what it notes."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxcompress._src.arrays.protocol import call, changes_inputs
from jaxcompress._src.execution.kernels.choice import Multiplier
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.types import CompressedArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fallback:
    """A use of a compressed leaf for which there is no rule, so that the plain array was made.

    Attributes:
        path: of the leaf.
        primitive: the JAX primitive that used it.
        shape: of the array that was made.
        nbytes: its size in bytes.
    """

    path: str
    primitive: str
    shape: tuple[int, ...]
    nbytes: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """A compressed value on its way through the walk.

    Attributes:
        array: the value.
        path: of the leaf that it comes from.
        transposed: of a matrix that is the transpose of another, that one. Kernels want what is stored: its transpose
            would be written out.
    """

    array: CompressedArray
    path: str = dataclasses.field(metadata={"static": True})
    transposed: Any = dataclasses.field(default=None, kw_only=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Runs:
    """Consecutive runs of a stack, along the first axis; each a `Weight` or a plain array."""

    parts: tuple[Any, ...]

    @staticmethod
    def joined(parts: Sequence[Any]) -> Any:
        """Parts one after another, as one list of runs; the only one that is not empty, or the first one, as it is."""
        flat = [piece for part in parts for piece in (part.parts if isinstance(part, Runs) else [part])]
        pieces = tuple(part for part, size in zip(flat, Runs(tuple(flat)).sizes, strict=True) if size)
        return Runs(pieces) if len(pieces) > 1 else (pieces or flat)[0]

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many layers each part has."""
        return tuple((part.array if isinstance(part, Weight) else part).shape[0] for part in self.parts)

    @property
    def begins(self) -> tuple[int, ...]:
        """The first layer of each part."""
        return tuple(itertools.accumulate((0, *self.sizes[:-1])))


Note = Callable[[Fallback], None]
"""Told about every fall-back."""


def ignore(fallback: Fallback) -> None:
    """A note that goes nowhere."""
    del fallback


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What the interpreter is given besides the program.

    Attributes:
        multiply: products with compressed leaves.
        note: told about fall-backs.
    """

    multiply: Multiplier
    note: Note


def plain(value: Any, primitive: str, note: Note) -> Any:
    """The plain array, noted; a value that is no leaf as it is.

    Raises:
        ValueError: the leaf's inputs are to be quantized, and never would be.
    """
    if isinstance(value, Runs):
        return on_auto_axes(jax.numpy.concatenate)([plain(part, primitive, note) for part in value.parts])
    if not isinstance(value, Weight):
        return value
    if changes_inputs(value.array) and primitive != "output":
        raise ValueError(
            f"The inputs of leaf {value.path!r} are to be quantized, but `{primitive}` changes it before a matmul, or "
            "uses it otherwise; exclude it."
        )
    array = value.array.materialize()
    note(Fallback(path=value.path, primitive=primitive, shape=array.shape, nbytes=array.size * array.dtype.itemsize))
    return array


def with_plain_weight(value: Any, primitive: str, note: Note) -> Any:
    """Where only the codes have no rule: the inputs are still to be quantized."""
    stored = call(value.array, "with_plain_weight") if isinstance(value, Weight) else None
    if stored is None:
        return value
    nbytes = stored.size * stored.dtype.itemsize
    note(Fallback(path=value.path, primitive=primitive, shape=stored.shape, nbytes=nbytes))
    return Weight(stored, value.path)
