"""The parameters of a module by path, compared with those that its config asks for."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util
from flax.core import unfreeze

from jaxcompress._src.types import Params


def flatten_params(params: Params) -> dict[str, Any]:
    """The leaves of nested dicts, by path with slashes. A compressed leaf is one leaf."""
    return traverse_util.flatten_dict(unfreeze(params), sep="/")


def check_parameters(leaves: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], model: str) -> None:
    """Checks that leaves are those of a model.

    Args:
        leaves: anything with a `.shape`, by path.
        shapes: of the model's parameters, by path.
        model: in words, for the message.

    Raises:
        ValueError: leaves are missing or unknown, or the shape of one differs; the message names them.
    """
    if missing := [path for path in shapes if path not in leaves]:
        raise ValueError(f"These leaves are missing from the params of {model}: {listed(missing)}.")
    if unknown := [path for path in leaves if path not in shapes]:
        raise ValueError(f"These leaves do not belong to the params of {model}: {listed(unknown)}.")
    for path, shape in shapes.items():
        if (found := tuple(leaves[path].shape)) != shape:
            raise ValueError(f"Leaf {path!r} has shape {found}, expected {shape}.")


def listed(names: list[str], *, most: int = 8) -> str:
    """Names for a message: the first few, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
