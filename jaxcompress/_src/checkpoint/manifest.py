"""What a checkpoint says about itself, as data."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax.numpy as jnp

from jaxcompress._src.tree.paths import path_string

FORMAT_VERSION = 3
"""Raised whenever an older reader would misread a new checkpoint.

2: arrays may be entropy-coded. 3: the manifest names its arrays, and has a checksum.
"""

Storage = Literal["orbax", "entropy"]
"""What holds the arrays."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredValue:
    """A leaf, or a part of a compressed one.

    Attributes:
        kind: `jax.Array`, `numpy.ndarray`, `numpy.generic`, `prng_key`, `python`, `None`, `Unselected`, or the class
            name of a compressed array.
        shape: logical shape; None where there is none (`None`, a compressed array with unselected parts).
        dtype: name of the logical dtype; None where there is no shape.
        array: the name under which Orbax holds the elements; None for everything that is no array. An array without
            elements has a name too, but Orbax, which cannot store it, does not know it.
        static: static fields, as JSON.
        parts: the components, by field name.
    """

    kind: str
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    array: str | None = None
    static: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    parts: Mapping[str, "StoredValue"] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays in memory."""
        return sum(math.prod(part.shape or ()) * jnp.dtype(part.dtype).itemsize for part in self.arrays())

    def arrays(self) -> Iterator["StoredValue"]:
        """The arrays among this value and its parts, in order."""
        if self.array is not None:
            yield self
        for part in self.parts.values():
            yield from part.arrays()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafRecord:
    """One leaf: where it is in the tree, and what is stored of it.

    Attributes:
        path: JAX key entries (`DictKey`, `SequenceKey`, `GetAttrKey`, `FlattenedIndexKey`).
        value: what is stored.
    """

    path: tuple[Any, ...]
    value: StoredValue

    @property
    def name(self) -> str:
        """The path as a string, such as `encoder/0/kernel`."""
        return path_string(self.path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructureNode:
    """A container of the tree, or the place of a leaf.

    Attributes:
        kind: `leaf`, a container that `restore` rebuilds (`dict`, `tuple`, ...), or a class name if `opaque`.
        leaf: number of the leaf, for a leaf.
        opaque: only its class can rebuild it: `restore` needs `like=`.
        static: what else the container holds (metadata of an NNX variable), as JSON.
        children: key entries and nodes, in order.
    """

    kind: str
    leaf: int | None = None
    opaque: bool = False
    static: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    children: tuple[tuple[Any, "StructureNode"], ...] = ()

    def walk(self, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], "StructureNode"]]:
        """Paths and nodes, this one first."""
        yield path, self
        for key, child in self.children:
            yield from child.walk((*path, key))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file that holds arrays.

    Attributes:
        size: in bytes.
        sha256: the first 128 bits of it, in hexadecimal: Orbax does not notice a changed byte.
        crc32: what formats 1 and 2 have in its place.
    """

    size: int
    sha256: str | None = None
    crc32: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that a checkpoint says about itself.

    Attributes:
        format_version: of the layout of the checkpoint.
        versions: of `jaxcompress`, `jax` and `orbax` that wrote it.
        config: of the model.
        metadata: whatever the writer added.
        structure: the containers.
        leaves: the leaves, in the order of `structure`.
        files: the files that hold the arrays, by path below the checkpoint.
        storage: what holds the arrays.
        arrays: name of the directory or file that holds them, inside the checkpoint.
        checksum: of all of the above, as it stands in the file: the first 128 bits of a SHA-256; None in formats 1 and
            2, where a changed scale or shape may pass unnoticed.
    """

    format_version: int
    versions: Mapping[str, str]
    config: Mapping[str, Any]
    metadata: Mapping[str, Any]
    structure: StructureNode
    leaves: tuple[LeafRecord, ...]
    files: Mapping[str, FileRecord]
    storage: Storage = "orbax"
    arrays: str = "arrays"
    checksum: str | None = None
