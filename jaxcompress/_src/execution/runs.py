"""A stack whose runs of layers are stored in different forms, on its way to the scan that takes it apart again."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxcompress._src.arrays.protocol import slice_axis
from jaxcompress._src.execution.values import Note, Runs, Weight, plain
from jaxcompress._src.meshes import on_auto_axes


def sliced_runs(eqn: Any, runs: Runs, note: Note) -> Any:
    """The runs that a `slice` along the first axis leaves; None where it slices other axes too."""
    shape, params = eqn.invars[0].aval.shape, eqn.params
    begins, ends, strides = params["start_indices"], params["limit_indices"], params["strides"]
    whole = all(begin == 0 and end == size for begin, end, size in zip(begins[1:], ends[1:], shape[1:], strict=True))
    if not whole or strides not in (None, (1,) * len(shape)):
        return None
    if begins[0] == ends[0]:
        return jnp.zeros(eqn.outvars[0].aval.shape, eqn.outvars[0].aval.dtype)
    return cut(runs, begins[0], ends[0], note)


def boundaries(values: Sequence[Any], length: int) -> list[tuple[int, int]]:
    """Begin and end of the runs in which every stack of `length` layers has one form."""
    places = {place for value in values if isinstance(value, Runs) for place in value.begins}
    return list(itertools.pairwise(sorted({0, length, *places})))


def cut(value: Any, begin: int, end: int, note: Note) -> Any:
    """The layers `begin:end` of a stack, in their stored form where that can be cut."""
    if isinstance(value, Runs):
        pieces = [
            cut(part, max(begin - start, 0), min(end - start, size), note)
            for part, start, size in zip(value.parts, value.begins, value.sizes, strict=True)
            if start < end and begin < start + size
        ]
        return pieces[0] if len(pieces) == 1 else Runs(tuple(pieces))
    array = value.array if isinstance(value, Weight) else value
    if end - begin == array.shape[0]:
        return value
    if isinstance(value, Weight):
        piece = on_auto_axes(functools.partial(slice_axis, axis=0, start=begin, size=end - begin))(value.array)
        return cut(plain(value, "slice", note), begin, end, note) if piece is None else Weight(piece, value.path)
    return on_auto_axes(lambda: value[begin:end])()
