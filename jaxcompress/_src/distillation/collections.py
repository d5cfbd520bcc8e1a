"""Mutable collections: parts of the parameters that the student itself renews, such as the statistics of BatchNorm."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.distillation.outputs import Outputs, named
from jaxcompress._src.tree.maps import leaves_with_paths, map_with_path
from jaxcompress._src.types import Params, Selector

Collections = dict[str, jax.Array]
"""Path of a leaf of the parameters -> its new value."""


class ReadOutputs(Mapping[str, Any]):
    """Outputs that remember which of them were read."""

    def __init__(self, outputs: Outputs) -> None:
        """Wraps outputs."""
        self.outputs = outputs
        self.read: set[str] = set()

    def constant(self) -> "ReadOutputs":
        """The same without gradient; what is read there counts as read here."""
        other = ReadOutputs(jax.lax.stop_gradient(dict(self.outputs)))
        other.read = self.read
        return other

    def __getitem__(self, name: str) -> Any:
        """One output; it counts as read."""
        self.read.add(name)
        return self.outputs[name]

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self.outputs)

    def __len__(self) -> int:
        """Their number."""
        return len(self.outputs)


def check_mutable(params: Params, names: Sequence[str]) -> None:
    """Checks that every mutable collection is a part of the parameters.

    Raises:
        ValueError: one is not; lists the parts there are.
    """
    parts = {path.split("/")[0] for path, _ in leaves_with_paths(params)}
    if missing := [name for name in names if name not in parts]:
        listed = ", ".join(map(repr, sorted(parts)))
        raise ValueError(f"`mutable` names {missing[0]!r}, which is no part of the parameters; those are {listed}.")


def immutable(names: Sequence[str], select: Selector | None) -> Selector | None:
    """A selector of what may be trained: no optimizer touches mutable collections."""
    if not names:
        return select

    def marks(params: Params) -> Params:
        selected = map_with_path(lambda *_: True, params) if select is None else select(params)
        return map_with_path(lambda path, _, mark: bool(mark) and path.split("/")[0] not in names, params, selected)

    return marks


def new_collections(params: Params, outputs: Outputs, names: Sequence[str]) -> Collections:
    """What the student returned for each leaf of its mutable collections, without gradient.

    Raises:
        ValueError: a collection was not returned, or has other leaves, shapes or dtypes than in the parameters.
    """
    before = {path: leaf for path, leaf in leaves_with_paths(params) if path.split("/")[0] in names}
    leaves: Collections = {}
    for name in names:
        tree = named(outputs, name, "student")
        leaves |= {f"{name}/{path}" if path else name: leaf for path, leaf in leaves_with_paths(tree)}
    if set(leaves) != set(before):
        other = sorted(set(leaves) ^ set(before))[0]
        where = "is returned but no part of" if other in leaves else "is a part of, but not returned with,"
        raise ValueError(f"The mutable leaf {other!r} {where} the parameters.")
    for path, leaf in leaves.items():
        old = before[path]
        if (jnp.shape(leaf), jnp.result_type(leaf)) != (old.shape, old.dtype):
            raise ValueError(
                f"The student returns {jnp.result_type(leaf)}{list(jnp.shape(leaf))} for the mutable leaf {path!r}, "
                f"which is {old.dtype}{list(old.shape)}."
            )
    return {path: jax.lax.stop_gradient(jnp.asarray(leaf)) for path, leaf in leaves.items()}


def with_collections(params: Params, collections: Collections) -> Params:
    """The parameters with new values for some leaves.

    Example:
        >>> with_collections({"params": {"w": 1}, "stats": {"mean": 2}}, {"stats/mean": jax.numpy.asarray(3)})
        {'params': {'w': 1}, 'stats': {'mean': Array(3, dtype=int32, weak_type=True)}}
    """
    return map_with_path(lambda path, leaf: collections.get(path, leaf), params) if collections else params


def check_all_read(outputs: ReadOutputs, mutable: Sequence[str]) -> None:
    """Checks that no collection among the outputs is lost.

    Raises:
        ValueError: a mapping that no loss or metric has read, and that is not mutable.
    """
    for name, value in outputs.outputs.items():
        if isinstance(value, Mapping) and name not in outputs.read and name not in mutable:
            raise ValueError(
                f"The student returns the collection {name!r}, which no loss or metric reads: it would be lost. Keep "
                f"it in the parameters and name it in `mutable=({name!r},)`, or do not return it."
            )
