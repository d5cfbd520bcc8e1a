"""How much of a model may be left: as a sparsity, as a cost, or as the number of units in every group of a kind."""

from collections.abc import Mapping, Sequence

from jaxcompress._src.units.group import UnitGroup, check_known


def check_budget(*, sparsity: int | float | None, budget: int | float | None, shape: Mapping[str, int] | None) -> None:
    """Checks that one of three is given, and in its range.

    Args:
        sparsity: 1 - cost of what is left / cost of everything.
        budget: cost of what is left.
        shape: kind -> units that stay in each group of it.

    Raises:
        ValueError: none or several are given, or one out of its range.
    """
    if sum(option is not None for option in (sparsity, budget, shape)) != 1:
        raise ValueError(f"Give one of `sparsity`, `budget` and `shape`, got {sparsity}, {budget} and {shape}.")
    if sparsity is not None and not 0 <= sparsity <= 1:
        raise ValueError(f"`sparsity` must be in [0, 1], got {sparsity}.")
    if budget is not None and not budget >= 0:
        raise ValueError(f"`budget` must be at least 0, got {budget}.")
    if shape is not None and not shape:
        raise ValueError("`shape` is empty: name at least one kind of units.")


def allowed_cost(total: float, *, sparsity: int | float | None, budget: int | float | None) -> float:
    """The cost that may be left of a total."""
    return float(budget) if budget is not None else (1 - (sparsity or 0.0)) * total


def check_reachable(allowed: float, least: float, total: float, *, slack: float) -> None:
    """Checks a budget against what stays when all units go that may.

    Args:
        allowed: the cost that may be left.
        least: the cost of what stays in any case.
        total: the cost of everything.
        slack: rounding error of `allowed`, relative to `total`.

    Raises:
        ValueError: less than `least` is allowed; names it.
    """
    if least > allowed + slack * total:
        raise ValueError(
            f"The budget {allowed:g} is below what the units allow: the least possible is {least:g} of {total:g} "
            f"(sparsity {1 - least / total:.6g})."
        )


def check_shape(groups: Sequence[UnitGroup], shape: Mapping[str, int]) -> None:
    """Checks that every kind exists, and that its groups have that many units.

    Raises:
        ValueError: they do not; names kind or group.
    """
    check_known(shape, {group.kind for group in groups if group.kind}, "shape")
    for group in groups:
        if group.kind in shape and not 0 <= shape[group.kind] <= group.count:
            raise ValueError(
                f"`shape` asks for {shape[group.kind]} {group.kind}; the unit group {group.name!r} has {group.count}."
            )
