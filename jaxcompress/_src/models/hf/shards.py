"""The files of a Hugging Face directory that hold weights: one, or shards with an index."""

import re
from collections.abc import Mapping

SAFETENSORS = "model.safetensors"
"""The file of weights that are in one."""

INDEX = "model.safetensors.index.json"
"""Which shard holds which tensor."""

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def size_in_bytes(size: int | str) -> int:
    """A size such as `"5GB"`, in bytes; units are powers of 1,000, as in transformers.

    Raises:
        ValueError: it is no positive number, or has another unit.

    Example:
        >>> size_in_bytes("5GB"), size_in_bytes("1.5 mb"), size_in_bytes(100)
        (5000000000, 1500000, 100)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]{2})\s*", size) if isinstance(size, str) else None
    unit = None if match is None else _UNITS.get(match[2].upper())
    count = size if isinstance(size, int) else 0 if match is None or unit is None else int(float(match[1]) * unit)
    if count <= 0:
        raise ValueError(
            f"`max_shard_size` must be a positive number of bytes, or such a number and one of {', '.join(_UNITS)} "
            f"('5GB'), got {size!r}."
        )
    return count


def files_of_tensors(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """The tensors of each file, in the order given; a file is full when the next tensor would take it beyond the limit.

    Args:
        sizes: of the tensors, in bytes.
        limit: of a file, in bytes of tensors. A tensor that is larger has a file of its own.

    Example:
        >>> files_of_tensors({"a": 6, "b": 4}, 10)
        {'model.safetensors': ['a', 'b']}
        >>> files_of_tensors({"a": 6, "b": 40, "c": 4, "d": 7}, 10)["model-00003-of-00004.safetensors"]
        ['c']
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SAFETENSORS: shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def is_shard(file: str) -> bool:
    """Whether a file name is one of `files_of_tensors`, of several.

    Example:
        >>> is_shard("model-00001-of-00002.safetensors"), is_shard("model.safetensors")
        (True, False)
    """
    return _SHARD.fullmatch(file) is not None
