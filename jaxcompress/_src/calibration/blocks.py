"""A model in consecutive blocks, each of which begins where its first leaf is first used."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxcompress._src.calibration.flat_program import FlatProgram, variables
from jaxcompress._src.calibration.leaf_part import LeafPart, meet
from jaxcompress._src.calibration.segments import Segments, segments_of


class Blocks(NamedTuple):
    """A program, cut into blocks; one after another they are the whole model.

    Attributes:
        parts: for each block the leaves, or entries of stacks, that are first used in it.
        outputs: for each block the variables of what it passes on, as far as it depends on leaves and is of floats.
        segments: one for each block; the last one writes the outputs of the model.
    """

    parts: list[list[LeafPart]]
    outputs: list[list[Any]]
    segments: Segments


def blocks_of(program: FlatProgram, stacks: Mapping[str, tuple[int, ...]], *, together: Callable[[str], Any]) -> Blocks:
    """Cuts a program where the first leaf of the next block is first used.

    What lives at a cut (the residual stream, masks) is found from the equations. Loops are never cut: the layers of a
    scan that is not unrolled are in one block.

    Args:
        program: the program.
        stacks: path of each leaf that defines blocks -> sizes of its first axes whose entries are parts of their own.
            Where the model uses only some of them, the leaf is one part.
        together: name of a part -> key; neighbours (in the order of first use) of equal keys share a block, and so do
            parts that are first used by one operation.

    Raises:
        ValueError: a leaf that no input ever meets; names it.

    Example:
        >>> from jaxcompress._src.calibration.flat_program import flat_program
        >>> def apply(params, x):
        ...     return jnp.tanh(x @ params["first"]) @ params["second"]
        >>> params = {"first": jnp.ones((2, 3)), "second": jnp.ones((3, 1))}
        >>> program = flat_program(apply, params, (jnp.ones((4, 2)),), stacks=[])
        >>> blocks = blocks_of(program, {"first": (), "second": ()}, together=lambda path: path)
        >>> [[var.aval.shape for var in outputs] for outputs in blocks.outputs]
        [[(4, 3)], [(4, 1)]]
    """
    flow = _Flow(program)
    used = {part: place for path, sizes in stacks.items() for part, place in flow.first_uses(path, sizes).items()}
    cuts, parts = _cuts(dict(sorted(used.items(), key=lambda item: item[1])), together)
    passed_on = [*(flow.live(cut) for cut in cuts[1:]), variables(program.outputs)]
    outputs = [[var for var in dict.fromkeys(each) if flow.is_fitted(var)] for each in passed_on]
    return Blocks(parts, outputs, segments_of(program, [(each, number) for number, each in enumerate(passed_on)]))


class _Flow:
    """Which values depend on leaves, and where they and the leaves are used."""

    def __init__(self, program: FlatProgram) -> None:
        self.program = program
        self.weighted = set(program.views)
        # The equation that makes a value, and the last one that reads it.
        self.place: dict[Any, int] = dict.fromkeys(program.inputs, -1)
        self.last: dict[Any, int] = {}
        # View -> the first equation in which a value that depends on inputs meets it.
        self.met: dict[Any, int] = {}
        # What is made of leaves alone, such as stacks that are put together, is used where inputs meet it.
        made = {var: frozenset([var]) for var in program.views}
        equations = program.body.jaxpr.eqns
        for place, eqn in enumerate(equations):
            if any(var in program.views for var in eqn.outvars):
                continue
            operands = variables(eqn.invars)
            self.last |= dict.fromkeys(operands, place)
            self.place |= dict.fromkeys(eqn.outvars, place)
            views = frozenset[Any]().union(*(made[var] for var in operands if var in made))
            if any(var in self.weighted for var in operands):
                self.weighted |= set(eqn.outvars)
            if not program.data.isdisjoint(operands):
                self.met = dict.fromkeys(views, place) | self.met
            elif views:
                made |= dict.fromkeys(eqn.outvars, views)
        self.last |= dict.fromkeys(variables(program.outputs), len(equations))

    def first_uses(self, path: str, sizes: tuple[int, ...]) -> dict[LeafPart, int]:
        """Part of a leaf -> the first equation in which inputs meet it."""
        used = {}
        for index in itertools.product(*map(range, sizes)):
            part = LeafPart(path=path, entry=tuple(enumerate(index)))
            views = [(self.program.views[var], place) for var, place in self.met.items()]
            places = [place for view, place in views if view.path == path and meet(view.entry, part.entry)]
            if places:
                used[part] = min(places)
            elif sizes:
                return self.first_uses(path, ())
            else:
                raise ValueError(f"Leaf {path!r} meets no input of the model: it belongs to no part of it.")
        return used

    def live(self, cut: int) -> list[Any]:
        """The values that depend on inputs, are there before an equation, and are used from it on."""
        return [
            var for var, at in self.place.items() if var in self.program.data and at < cut <= self.last.get(var, -1)
        ]

    def is_fitted(self, var: Any) -> bool:
        """Whether a value depends on leaves, without being one, and is of floats."""
        return var in self.weighted and var not in self.program.views and jnp.issubdtype(var.aval.dtype, jnp.floating)


def _cuts(used: Mapping[LeafPart, int], together: Callable[[str], Any]) -> tuple[list[int], list[list[LeafPart]]]:
    """The equations at which blocks begin, and their parts."""
    cuts: list[int] = []
    parts: list[list[LeafPart]] = []
    last: tuple[Any, int] | None = None
    for part, place in used.items():
        key = together(part.name)
        # What inputs meet all at once (experts that are stacked) is in one block.
        if last is None or (key != last[0] and place != last[1]):
            cuts.append(place)
            parts.append([])
        parts[-1].append(part)
        last = key, place
    return cuts, parts
