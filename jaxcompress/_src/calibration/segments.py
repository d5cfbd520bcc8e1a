"""A model cut into consecutive parts, by its jaxpr."""

import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxcompress._src.meshes import as_typed
from jaxcompress._src.trace.walk import Body, bind, inlined, walk
from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.types import Params


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """A part of a model.

    Attributes:
        paths: of the selected leaves that are first used here.
        body: its equations; the inputs are all leaves of the params, then the live values.
        floats: which of the values that it passes on depend on the params of the model so far, and are floats.
    """

    paths: tuple[str, ...]
    body: Any
    floats: tuple[bool, ...]

    def __call__(self, params: Params, values: Sequence[Any]) -> list[Any]:
        """The values that live behind this part, from those that live before it. Pure; may be compiled."""
        operands = zip([*jax.tree.leaves(params), *values], self.body.jaxpr.invars, strict=True)
        return walk(self.body, [as_typed(value, var.aval) for value, var in operands], bind)


class UnmetError(ValueError):
    """A leaf that no input of the model ever meets; `path` is its."""

    def __init__(self, path: str) -> None:
        super().__init__(f"Leaf {path!r} meets no input of the model: it belongs to no part of it.")
        self.path = path


def segments(
    apply: Callable[..., Any],
    params: Params,
    inputs: Sequence[Any],
    *,
    paths: Sequence[str],
    together: Callable[[str], Any],
) -> list[Segment]:
    """Cuts a model where the first leaf of the next group is first used; one part after another is the whole model.

    What lives at a cut (the residual stream, masks) is found from the jaxpr. Loops are never cut: the layers of a scan
    are one part, but for stacks that `unstacked` gives entry by entry.

    Args:
        apply: `(params, *inputs) -> outputs`.
        params: arrays, or `jax.ShapeDtypeStruct`.
        inputs: trees of arrays, or of `jax.ShapeDtypeStruct`; the first part takes their leaves as its values.
        paths: of the leaves that define the parts.
        together: path -> key; neighbours (in the order of first use) of equal keys share a part,
            and so do leaves that are first used by one operation.

    Returns:
        The parts, in order. The last one returns the leaves of the model's outputs.

    Raises:
        UnmetError: a leaf that no input ever meets; names it.

    Example:
        >>> import jax.numpy as jnp
        >>> def apply(params, x):
        ...     return jnp.tanh(x @ params["first"]) @ params["second"]
        >>> params, x = {"first": jnp.ones((2, 3)), "second": jnp.ones((3, 1))}, jnp.ones((4, 2))
        >>> first, second = segments(apply, params, (x,), paths=["first", "second"], together=lambda path: path)
        >>> [value.shape for value in first(params, [x])], second(params, first(params, [x]))[0].shape
        ([(4, 3)], (4, 1))
    """
    closed = inlined(jax.make_jaxpr(apply)(params, *inputs))
    jaxpr, leaves = closed.jaxpr, leaves_with_paths(params)
    flow = _Flow(jaxpr, len(leaves))
    used = flow.first_uses([path for path, _ in leaves], paths)
    cuts, owners = _cuts(used, together)
    found = []
    for k, begin in enumerate(cuts):
        end = cuts[k + 1] if k + 1 < len(cuts) else len(jaxpr.eqns)
        entering = flow.live(begin) if k else list(jaxpr.invars[len(leaves) :])
        leaving = flow.live(end) if k + 1 < len(cuts) else list(jaxpr.outvars)
        part = SimpleNamespace(
            constvars=jaxpr.constvars,
            invars=[*jaxpr.invars[: len(leaves)], *entering],
            outvars=leaving,
            eqns=flow.equations(begin, end, leaving),
        )
        floats = tuple(var in flow.weighted and jnp.issubdtype(var.aval.dtype, jnp.floating) for var in leaving)
        found.append(Segment(tuple(owners[k]), Body(part, closed.consts), floats))
    return found


class _Flow:
    """Which values depend on inputs, which on params, and where they are used."""

    def __init__(self, jaxpr: Any, leaf_count: int) -> None:
        self.jaxpr, self.leaf_count = jaxpr, leaf_count
        self.data = set(jaxpr.invars[leaf_count:])
        self.weighted = set(jaxpr.invars[:leaf_count])
        self.place: dict[Any, int] = dict.fromkeys(jaxpr.invars, -1)
        self.last: dict[Any, int] = {}
        for i, eqn in enumerate(jaxpr.eqns):
            variables = _variables(eqn.invars)
            for var in variables:
                self.last[var] = i
            self.data |= set(eqn.outvars) if any(var in self.data for var in variables) else set()
            self.weighted |= set(eqn.outvars) if any(var in self.weighted for var in variables) else set()
            self.place |= dict.fromkeys(eqn.outvars, i)
        self.last |= dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns))

    def first_uses(self, names: Sequence[str], paths: Sequence[str]) -> dict[str, int]:
        """Path -> the first equation in which a value that depends on inputs meets the leaf; in that order."""
        # What is made of leaves alone, such as stacks that are put together, is used where inputs meet it.
        made: dict[Any, frozenset[int]] = {
            var: frozenset([n]) for n, var in enumerate(self.jaxpr.invars[: self.leaf_count])
        }
        used: dict[str, int] = {}
        for i, eqn in enumerate(self.jaxpr.eqns):
            own = frozenset().union(*(made[var] for var in _variables(eqn.invars) if var in made))
            if any(var in self.data for var in eqn.outvars):
                for number in sorted(own):
                    used.setdefault(names[number], i)
            elif own:
                made |= dict.fromkeys(eqn.outvars, own)
        missing = [path for path in paths if path not in used]
        if missing:
            raise UnmetError(missing[0])
        return dict(sorted(((path, used[path]) for path in paths), key=lambda item: item[1]))

    def live(self, cut: int) -> list[Any]:
        """The values that depend on inputs, are there before an equation, and are used from it on."""
        return [v for v, at in self.place.items() if v in self.data and at < cut <= self.last.get(v, -1)]

    def equations(self, begin: int, end: int, leaving: Sequence[Any]) -> list[Any]:
        """What it takes to compute some values from those that live at `begin`, and the params."""
        wanted, kept = set(_variables(leaving)), []
        for i in range(end - 1, -1, -1):
            eqn = self.jaxpr.eqns[i]
            own = not any(var in self.data for var in eqn.outvars) or i >= begin
            if own and wanted & set(eqn.outvars):
                kept.append(eqn)
                wanted |= set(_variables(eqn.invars))
        return kept[::-1]


def _cuts(used: dict[str, int], together: Callable[[str], Any]) -> tuple[list[int], list[list[str]]]:
    cuts: list[int] = []
    owners: list[list[str]] = []
    last: tuple[Any, int] | None = None
    for path, at in used.items():
        key = together(path)
        # What inputs meet all at once (experts that are stacked) is in one part.
        if last is None or (key != last[0] and at != last[1]):
            cuts.append(at if cuts else 0)
            owners.append([])
        owners[-1].append(path)
        last = key, at
    return cuts, owners


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]
