"""Leaves that are used part by part: whose rows count, and when that cannot be told."""

from collections.abc import Sequence

import numpy as np

from jaxcompress._src.calibration.rows import Rows, Same
from jaxcompress._src.calibration.values import Use

Shares = dict[tuple[int | None, ...], tuple[float, bool]]


def repeated_uses(uses: Sequence[Use], refused: dict[int, str]) -> dict[int, Shares]:
    """The uses that multiply the same rows by different outputs of a leaf.

    A kernel that is split along its outputs (into query, key and value, say) meets the same input several times, but
    each output only once: its rows count once.

    Args:
        uses: of all leaves, in execution order.
        refused: gets the leaves whose parts meet different inputs, so that no one matrix of inputs is theirs.

    Returns:
        leaf -> place -> (how much the products of its rows count, whether the rows themselves do). Where outputs meet
        multiples of the rows, each use counts by its share of the outputs; otherwise the first one stands for all.
    """
    shares: dict[int, Shares] = {}
    for number in {use.leaf for use in uses}:
        try:
            shares[number] = _repeated([use for use in uses if use.leaf == number])
        except ValueError as err:
            refused.setdefault(number, str(err))
    return shares


def _repeated(uses: Sequence[Use]) -> Shares:
    """Those of one leaf."""
    shares: Shares = {}
    contractions = [(use, use.rows) for use in uses if use.rows is not None]
    for group in _by_entry(contractions):
        if len({rows.inputs.tobytes() for _, rows in group}) > 1:
            raise ValueError(
                "it is split along its inputs, and its parts meet inputs of their own: which of them belong to one "
                "row cannot be told; store the parts as leaves"
            )
        if all(rows.outputs is None for _, rows in group):
            continue
        classes: dict[object, list[tuple[Use, Rows]]] = {}
        for use, rows in group:
            # Rows that are scaled are equal to themselves only.
            key = use.place[:-1], Same(use.source), Same(use) if use.signature is None else use.signature
            classes.setdefault(key, []).append((use, rows))
        covered = {_union(members).tobytes() for members in classes.values()}
        if len(covered) > 1:
            raise ValueError(
                "it is split along its outputs, and its parts multiply different inputs: no one matrix of inputs is "
                "its own; store the parts as leaves"
            )
        for members in classes.values():
            total = sum(_made(rows) for _, rows in members)
            alike = all(rows.multiples is None for _, rows in members)
            for k, (use, rows) in enumerate(members):
                shares[use.place] = (float(k == 0) if alike else _made(rows) / total, k == 0)
    return shares


def _made(rows: Rows) -> int:
    """How many outputs it makes; of uses that are told apart by them."""
    return 1 if rows.outputs is None else int(rows.outputs.sum())


def _union(uses: Sequence[tuple[Use, Rows]]) -> np.ndarray:
    """The outputs that uses of one input make together."""
    total = np.zeros(0)
    for _, rows in uses:
        made = np.ones(1, bool) if rows.outputs is None else rows.outputs
        total = made.astype(float) if not total.size else total + made
    if total.max(initial=0) > 1:
        raise ValueError(
            "some of its outputs multiply the same input several times, others do not: no one matrix of inputs is "
            "its own"
        )
    return np.ones(1, bool) if (total > 0).all() else total > 0


def _by_entry(uses: Sequence[tuple[Use, Rows]]) -> list[list[tuple[Use, Rows]]]:
    """Uses of the same stack entries; all of them together where loops choose the entry."""
    groups: list[tuple[set[int], list[tuple[Use, Rows]]]] = []
    for use, rows in uses:
        numbers = set(rows.entries.tolist())
        touched = [group for group in groups if group[0] & numbers or rows.moving or group[1][0][1].moving]
        joined = [pair for group in touched for pair in group[1]]
        groups = [group for group in groups if group not in touched]
        groups.append((numbers.union(*(group[0] for group in touched)), [*joined, (use, rows)]))
    return [group for _, group in groups]
