"""How many directions each leaf keeps."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxcompress._src.solvers.budget import cheapest_choice

Unit = Literal["parameters", "bytes"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Spectrum:
    """What a rank of one leaf costs and loses.

    Attributes:
        path: of the leaf.
        losses: (K + 1,), float64: the squared error, in the norm that the method minimises, at ranks 0 to K; of a stack
            of leaves, the sum.
        inputs: D.
        outputs: R.
        stack: number of stack entries; they all get the same rank.
        itemsize: bytes per number.
    """

    path: str
    losses: np.ndarray
    inputs: int
    outputs: int
    stack: int = 1
    itemsize: int = 4

    @property
    def most(self) -> int:
        """K = min(D, R)."""
        return len(self.losses) - 1

    @property
    def dense(self) -> int:
        """Parameters of the dense leaf."""
        return self.stack * self.inputs * self.outputs

    def parameters(self, rank: int) -> int:
        """Parameters of both factors."""
        return self.stack * rank * (self.inputs + self.outputs)


RankRule = Callable[[Sequence[Spectrum]], Mapping[str, int | None]]
"""`spectra -> path -> rank`; None: the leaf stays dense."""


def spectrum(path: str, values: Any, *, inputs: int, outputs: int, itemsize: int = 4) -> Spectrum:
    """From singular values, (S, K).

    Example:
        >>> spectrum("w", [[2.0, 1.0]], inputs=2, outputs=3).losses
        array([5., 1., 0.])
    """
    squares = np.square(np.asarray(values, np.float64))
    losses = np.concatenate([np.cumsum(squares.sum(0)[::-1])[::-1], [0.0]])
    return Spectrum(
        path=path, losses=losses, inputs=inputs, outputs=outputs, stack=len(squares), itemsize=int(itemsize)
    )


def fixed_rank(rank: int | Mapping[str, int | None]) -> RankRule:
    """A rank for all leaves, or for each by path; at most min(D, R). Of a mapping, None keeps a leaf dense.

    Raises:
        ValueError: a negative rank; from the rule: a leaf that the mapping does not have.
    """
    given = rank.values() if isinstance(rank, Mapping) else (rank,)
    if any(value is not None and (not _is_whole(value) or value < 0) for value in given):
        raise ValueError(f"A rank must be an integer of at least 0, got {rank}.")

    def rule(spectra: Sequence[Spectrum]) -> dict[str, int | None]:
        ranks: dict[str, int | None] = {}
        for leaf in spectra:
            if isinstance(rank, Mapping) and leaf.path not in rank:
                raise ValueError(f"`rank` has no entry for leaf {leaf.path!r}; there are {sorted(rank)}.")
            given = rank[leaf.path] if isinstance(rank, Mapping) else rank
            ranks[leaf.path] = None if given is None else min(int(given), leaf.most)
        return ranks

    return rule


def energy(share: float) -> RankRule:
    """The lowest rank that keeps a share of Σ σ²; leaves whose factors would be no smaller stay dense.

    Raises:
        ValueError: `share` is not in (0, 1].

    Example:
        >>> rule = energy(0.8)
        >>> rule([spectrum("w", [[3.0, 1.0, 0.1]], inputs=8, outputs=8)])
        {'w': 1}
    """
    _check_share(share)

    def rank_of(leaf: Spectrum) -> int | None:
        allowed = (1 - share) * leaf.losses[0]
        # Of a leaf of zeros, no direction has any energy.
        rank = int(np.argmax(leaf.losses <= allowed))
        return rank if leaf.parameters(rank) < leaf.dense else None

    return lambda spectra: {leaf.path: rank_of(leaf) for leaf in spectra}


def parameter_share(share: float) -> RankRule:
    """The same share of parameters for every leaf: k = int(share D R / (D + R)), at least 1.

    Leaves so small that one direction takes more than that stay dense.

    Raises:
        ValueError: `share` is not in (0, 1].

    Example:
        >>> parameter_share(0.5)([spectrum("w", [[1.0] * 384], inputs=384, outputs=1536)])
        {'w': 153}

    References:
        The rank that the released code of SVD-LLM takes.
    """
    _check_share(share)

    def rank_of(leaf: Spectrum) -> int | None:
        width = leaf.inputs + leaf.outputs
        rank = max(int(leaf.inputs * leaf.outputs * share / max(width, 1)), 1)
        return rank if leaf.parameters(rank) < leaf.dense else None

    return lambda spectra: {leaf.path: rank_of(leaf) for leaf in spectra}


def budget(
    share: float | None = None,
    *,
    total: int | None = None,
    unit: Unit = "parameters",
    relative: bool = False,
    importance: Mapping[str, float] | None = None,
    multiple_of: int = 1,
    least: int = 1,
    max_states: int = 200_000,
) -> RankRule:
    """The ranks that lose least, all leaves together, within a budget; exactly, by `solvers.cheapest_choice`.

    Minimises Σ over leaves of importance · loss(rank), where a leaf may also stay dense and lose nothing.

    The optimum is that of the losses it is given: only where they compare across leaves is it worth having. Those of
    `activation_svd(fisher=...)` do, and halve the divergence of a fine-tuned MiniLM at half the parameters; output
    errors as such, relative or not, starve leaves that matter, and are worse there than equal shares.

    Args:
        share: of the dense size of the leaves, in (0, 1]; either this or `total`.
        total: the budget itself, in units.
        unit: "parameters", or "bytes" where leaves differ in dtype.
        relative: divide the loss of each leaf by its loss at rank 0.
        importance: path -> factor on the loss; 1 for leaves left out.
        multiple_of: ranks are multiples of it (hardware likes 8, 16 or 128).
        least: lowest rank, rounded up to such a multiple.
        max_states: see `cheapest_choice`.

    Returns:
        The rule. It raises `ValueError` when even the lowest ranks exceed the budget.

    Raises:
        ValueError: not exactly one of `share` and `total`, or an option out of range.

    Example:
        >>> a, b = ([[9.0, 1.0]], [[3.0, 3.0]])
        >>> leaves = [spectrum(name, values, inputs=8, outputs=2) for name, values in (("a", a), ("b", b))]
        >>> budget(total=30)(leaves)
        {'a': 1, 'b': None}
    """
    if (share is None) == (total is None):
        raise ValueError(f"Give one of `share` and `total`, got {share} and {total}.")
    if share is not None:
        _check_share(share)
    if unit not in ("parameters", "bytes"):
        raise ValueError(f"`unit` must be 'parameters' or 'bytes', got {unit!r}.")
    for name, value, low in (("multiple_of", multiple_of, 1), ("least", least, 0)):
        if not _is_whole(value) or value < low:
            raise ValueError(f"`{name}` must be an integer of at least {low}, got {value}.")
    option = functools.partial(_options, unit=unit, relative=relative, multiple_of=multiple_of, least=least)

    def rule(spectra: Sequence[Spectrum]) -> dict[str, int | None]:
        ranks, costs, losses = zip(
            *(option(leaf, (importance or {}).get(leaf.path, 1.0)) for leaf in spectra), strict=True
        )
        sizes = [leaf.dense * (leaf.itemsize if unit == "bytes" else 1) for leaf in spectra]
        limit = int(total if total is not None else (share or 0.0) * sum(sizes) + 1e-6)
        # Costs are multiples of widths: in units of what they share, far fewer sums of them differ.
        step = max(math.gcd(*(cost for leaf_costs in costs for cost in leaf_costs)), 1)
        scaled = [[cost // step for cost in leaf_costs] for leaf_costs in costs]
        choice = cheapest_choice(scaled, losses, limit // step, max_states=max_states)
        choices = zip(spectra, ranks, choice.options, strict=True)
        return {leaf.path: leaf_ranks[option] for leaf, leaf_ranks, option in choices}

    return rule


def as_rule(rank: int | Mapping[str, int | None] | RankRule) -> RankRule:
    """A rank, ranks by path, or a rule, as a rule."""
    return fixed_rank(rank) if _is_whole(rank) or isinstance(rank, Mapping) else rank  # pyright: ignore


def _options(
    leaf: Spectrum, importance: float, *, unit: Unit, relative: bool, multiple_of: int, least: int
) -> tuple[list[int | None], list[int], list[float]]:
    """Ranks with their costs and losses, below the size of the dense leaf, and that leaf itself."""
    size = leaf.itemsize if unit == "bytes" else 1
    first = -(-least // multiple_of) * multiple_of
    ranks = [k for k in range(first, leaf.most + 1, multiple_of) if leaf.parameters(k) < leaf.dense]
    weight = importance / (leaf.losses[0] if relative and leaf.losses[0] > 0 else 1.0)
    costs = [size * leaf.parameters(rank) for rank in ranks]
    return [*ranks, None], [*costs, size * leaf.dense], [*(weight * float(leaf.losses[rank]) for rank in ranks), 0.0]


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"`share` must be in (0, 1], got {share}.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
