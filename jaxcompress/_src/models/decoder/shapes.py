"""Sizes that parameters of decoders say."""

import re
from collections.abc import Mapping
from typing import Any


def layer_count(leaves: Mapping[str, Any], prefix: str) -> int:
    """The number of layers under a path.

    Raises:
        ValueError: they are not numbered from 0 without gaps.
    """
    numbers = {int(match[1]) for path in leaves if (match := re.match(rf"{prefix}/(\d+)/", path))}
    if not numbers or numbers != set(range(len(numbers))):
        raise ValueError(f"The layers under {prefix!r} must be numbered from 0 without gaps, found {sorted(numbers)}.")
    return len(numbers)


def outputs_of(leaves: Mapping[str, Any], path: str, width: int = 1) -> int:
    """The outputs of a kernel, in units of a width.

    Raises:
        ValueError: it is missing, is no matrix, or has no whole number of units.
    """
    if path not in leaves:
        raise ValueError(f"Leaf {path!r} is missing from the params.")
    if len(shape := tuple(leaves[path].shape)) != 2:
        raise ValueError(f"Leaf {path!r} has shape {shape}, expected (inputs, outputs).")
    if shape[1] % width:
        raise ValueError(f"Leaf {path!r} has {shape[1]} outputs, expected a multiple of {width}.")
    return shape[1] // width
