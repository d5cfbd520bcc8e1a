"""The optimal-brain column solver: SparseGPT with a rule for what to prune, GPTQ with one for how to round.

Shape letters: D inputs, R outputs; a kernel is (D, R), so that one *column* of the papers' (out, in) matrix is a row
here. B inputs in a block.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxcompress._src.solvers.rows import row, rows, with_row, with_rows

KeepBlock = Callable[[Any, Any, Any], Any]
"""`(weights (B, R), diagonal (B,), number of the block) -> bool (B, R)`: which to keep, decided when a block begins."""

KeepRun = Callable[[Any, Any], Any]
"""`(weights (m, R), diagonal (m,)) -> bool (m, R)`: which to keep of m inputs, decided when the first is reached."""

QuantizeColumn = Callable[[Any, Any, Any], Any]
"""`(weights (R,), parameters, number of the input) -> (R,)`: the nearest weights that can be stored.

Inputs beyond D, which fill up the last block, are asked for, too; what is said about them is ignored.
"""

StartGroup = Callable[[Any, Any], Any]
"""`(weights (g, R), number of its first input) -> parameters` of the quantizer, from the weights as updated so far."""


class _Rules(NamedTuple):
    """The hooks, and the sizes that follow from them."""

    keep_block: KeepBlock | None
    keep_run: KeepRun | None
    quantize_column: QuantizeColumn | None
    start_group: StartGroup | None
    block: int
    step: int
    run: int
    group: int


def solve_columns(
    weights: Float[Array, "D R"],
    factor: Float32[Array, "D D"],
    *,
    block_size: int = 128,
    keep_block: KeepBlock | None = None,
    keep_run: KeepRun | None = None,
    run_size: int = 1,
    quantize_column: QuantizeColumn | None = None,
    start_group: StartGroup | None = None,
    group_size: int | None = None,
) -> Float32[Array, "D R"]:
    """Fixes the weights of one input after another; the inputs still to come make up for the error.

    For input i, with U the upper factor of the inverse Hessian, H⁻¹ = Uᵀ U:

        q = quantize(w_i) where it is kept, else 0;  e = (w_i - q) / U_ii;  w_j -= e U_ij for all j >= i.

    The work inside a block runs over small steps, the rest is one matmul a block; loops are scans, so that the time to
    compile does not depend on D. Hooks see weights as updated so far. Without any hook the weights come back unchanged.

    Args:
        weights: a kernel; computed in float32.
        factor: U, as `inverse_factor` makes it.
        block_size: B; rounded up to a multiple of `run_size` and of groups that are smaller.
        keep_block: what to keep, block by block. Inputs beyond D (the last block is filled up) come with weight 0 and
            diagonal 0; what is said about them is ignored.
        keep_run: what to keep, run by run; among what `keep_block` keeps, if both are given.
        run_size: m, for `keep_run`.
        quantize_column: applied to the kept weights.
        start_group: makes its parameters, at every `group_size` inputs. Without it they are None.
        group_size: inputs in a group; all of them by default. A group beyond B must be a multiple of it.

    Returns:
        The weights, exactly 0 where pruned.

    Raises:
        ValueError: sizes that do not fit one another.

    Example:
        >>> from jaxcompress._src.solvers.cholesky import inverse_factor
        >>> H = jnp.array([[1.0, 0.9], [0.9, 1.0]])
        >>> U = inverse_factor(H, 0.0).factor
        >>> solve_columns(jnp.ones((2, 1)), U, keep_block=lambda w, d, block: jnp.arange(128)[:, None] > 0).round(2)
        Array([[0. ],
               [1.9]], dtype=float32)

    References:
        Frantar and Alistarh 2023, "SparseGPT", algorithm 1; Frantar et al. 2022, "GPTQ", algorithm 1.
    """
    depth = weights.shape[0]
    if not weights.size:
        return weights.astype(jnp.float32)
    rules = _rules(depth, block_size, run_size, group_size, keep_block, keep_run, quantize_column, start_group)
    return _solve(weights.astype(jnp.float32), factor, rules)[0]


def solve_groups(
    weights: Float[Array, "D R"],
    factor: Float32[Array, "D D"],
    *,
    quantize_column: QuantizeColumn,
    start_group: StartGroup,
    group_size: int,
    block_size: int = 128,
) -> tuple[Float32[Array, "D R"], Any]:
    """`solve_columns` for a quantizer whose parameters must be stored: what `start_group` made comes back, too.

    Args:
        weights: not empty.
        factor: from `inverse_factor`.
        quantize_column: what rounds the weights of one input, by the parameters of its group.
        start_group: makes the parameters of a group, from its weights as updated so far.
        group_size: divides D.
        block_size: inputs between two updates of all the rest.

    Returns:
        The weights, and the parameters of all groups, stacked.

    Example:
        >>> def start(w, first):
        ...     return jnp.abs(w).max(axis=0)
        >>> def to_ends(w, top, i):
        ...     return jnp.sign(w) * top
        >>> w = jnp.array([[1.0], [3.0], [5.0], [2.0]])
        >>> solved, tops = solve_groups(w, jnp.eye(4), quantize_column=to_ends, start_group=start, group_size=2)
        >>> solved.ravel().tolist(), tops.tolist()
        ([3.0, 3.0, 5.0, 5.0], [[3.0], [5.0]])
    """
    depth = weights.shape[0]
    rules = _rules(depth, block_size, 1, group_size, None, None, quantize_column, start_group)
    solved, by_step = _solve(weights.astype(jnp.float32), factor, rules)
    # Every step lies within one group.
    return solved, jax.tree.map(lambda part: part[: depth // rules.step or 1][:: rules.group // rules.step], by_step)


def block_sizes(depth: int, block_size: int, *, multiple: int = 1) -> list[int]:
    """How many real inputs each block of `solve_columns` has.

    Example:
        >>> block_sizes(10, 4), block_sizes(10, 4, multiple=3)
        ([4, 4, 2], [6, 4])
    """
    size = _round_up(block_size, multiple)
    return [min(size, depth - start) for start in range(0, depth, size)]


def _rules(
    depth: int,
    block_size: int,
    run_size: int,
    group_size: int | None,
    keep_block: KeepBlock | None,
    keep_run: KeepRun | None,
    quantize_column: QuantizeColumn | None,
    start_group: StartGroup | None,
) -> _Rules:
    group = depth if group_size is None else group_size
    if min(block_size, run_size, group) < 1:
        raise ValueError(f"Sizes must be positive, got {block_size=}, {run_size=}, {group_size=}.")
    run = run_size if keep_run is not None else 1
    # One group of all inputs sets no borders: runs would otherwise be cut where the last of them is short.
    grouped = group_size is not None and group < block_size
    if grouped and group % run:
        raise ValueError(f"`group_size` must be a multiple of `run_size`, got {group} and {run}.")
    inner = group if grouped else run
    block = _round_up(block_size, inner)
    if block < group < depth and group % block:
        raise ValueError(f"`group_size` {group} beyond the block must be a multiple of `block_size` {block}.")
    # Steps begin where runs and groups do; 16 inputs at a time keep the updates in the cache.
    common = group if grouped else block
    step = max((size for size in range(1, 33) if common % size == 0 and size % run == 0), default=common)
    return _Rules(keep_block, keep_run, quantize_column, start_group, block, step, run, group)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _solve(
    weights: Float32[Array, "D R"], factor: Float32[Array, "D D"], rules: _Rules
) -> tuple[Float32[Array, "D R"], Any]:
    """The weights, and the quantizer's parameters step by step."""
    depth = weights.shape[0]
    padding = -depth % rules.block
    weights, factor = jnp.pad(weights, ((0, padding), (0, 0))), jnp.pad(factor, (0, padding))
    parameters = _first_parameters(weights, rules)

    def block(state: Any, number: Int32[Array, ""]) -> Any:
        weights, parameters = state
        start = number * rules.block
        part, factor_rows = rows(weights, start, rules.block), rows(factor, start, rules.block)
        square = rows(factor_rows, start, rules.block, axis=1)
        if rules.start_group is not None and rules.block <= rules.group < depth:
            parameters = _renewed(rules, parameters, weights, start, start)
        (solved, errors, parameters), by_step = _solve_block(part, square, parameters, number, rules)
        # U is upper triangular: inputs before this block get exactly 0.
        weights = weights - _product(factor_rows.T, errors)
        return (with_rows(weights, solved, start), parameters), by_step

    blocks = jnp.arange(weights.shape[0] // rules.block)
    (weights, _), by_step = jax.lax.scan(block, (weights, parameters), blocks)
    return weights[:depth], jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:]), by_step)


def _solve_block(
    weights: Float32[Array, "B R"],
    square: Float32[Array, "B B"],
    parameters: Any,
    number: Int32[Array, ""],
    rules: _Rules,
) -> tuple[tuple[Float32[Array, "B R"], Float32[Array, "B R"], Any], Any]:
    """The block's weights, the errors that later inputs have to make up for, and the quantizer's parameters.

    These are what is left of them, and, apart, what each step had.
    """
    diagonal = jnp.diagonal(square)
    mask = None if rules.keep_run is None else jnp.ones(weights.shape, bool)
    if rules.keep_block is not None:
        mask = rules.keep_block(weights, diagonal, number)

    def step(state: Any, at: Int32[Array, ""]) -> Any:
        weights, errors, parameters = state
        begin, index = at * rules.step, number * rules.block + at * rules.step
        if rules.start_group is not None and rules.group < rules.block:
            parameters = _renewed(rules, parameters, weights, begin, index)
        part_weights, square_rows = rows(weights, begin, rules.step), rows(square, begin, rules.step)
        part_mask = None if mask is None else rows(mask, begin, rules.step)
        small = rows(square_rows, begin, rules.step, axis=1)
        solved, part_errors = _solve_step(part_weights, part_mask, small, parameters, index, rules)
        weights = with_rows(weights - _product(square_rows.T, part_errors), solved, begin)
        return (weights, with_rows(errors, part_errors, begin), parameters), parameters

    state = (weights, jnp.zeros_like(weights), parameters)
    return jax.lax.scan(step, state, jnp.arange(rules.block // rules.step))


def _solve_step(
    weights: Float32[Array, "S R"],
    mask: Bool[Array, "S R"] | None,
    square: Float32[Array, "S S"],
    parameters: Any,
    index: Int32[Array, ""],
    rules: _Rules,
) -> tuple[Float32[Array, "S R"], Float32[Array, "S R"]]:
    """Input after input."""
    diagonal = jnp.diagonal(square)
    places = jnp.arange(rules.step)
    inverse = jnp.where(diagonal > 0, 1 / jnp.where(diagonal > 0, diagonal, 1.0), 0.0)

    def column(i: Int32[Array, ""], state: Any) -> Any:
        weights, errors, mask = state
        if rules.keep_run is not None:
            decide = functools.partial(_run_kept, weights=weights, diagonal=diagonal, i=i, rules=rules)
            mask = jax.lax.cond(i % rules.run == 0, decide, _same, mask)
        before = row(weights, i)
        solved = before if rules.quantize_column is None else rules.quantize_column(before, parameters, index + i)
        if mask is not None:
            solved = jnp.where(row(mask, i), solved, 0.0)
        # Beyond the last input the diagonal is 0, and so is the error, whatever the quantizer says.
        scale = row(inverse, i)
        error = jnp.where(scale > 0, (before - solved) * scale, 0.0)
        # Not `with_row`: fused with the difference, it would not be vectorized.
        updated = weights - row(square, i)[:, None] * error[None]
        weights = jnp.where((places == i)[:, None], solved[None], updated)
        return weights, with_row(errors, error, i), mask

    state = (weights, jnp.zeros_like(weights), mask)
    weights, errors, _ = jax.lax.fori_loop(0, rules.step, column, state)
    return weights, errors


def _run_kept(mask: Array, *, weights: Array, diagonal: Array, i: Array, rules: _Rules) -> Array:
    assert rules.keep_run is not None  # the caller looked
    run, before, scale = (rows(part, i, rules.run) for part in (weights, mask, diagonal))
    return with_rows(mask, before & rules.keep_run(run, scale), i)


def _first_parameters(weights: Array, rules: _Rules) -> Any:
    return None if rules.start_group is None else rules.start_group(weights[: rules.group], jnp.int32(0))


def _renewed(rules: _Rules, parameters: Any, weights: Array, begin: Array, index: Array) -> Any:
    assert rules.start_group is not None  # the caller looked
    start_group = rules.start_group
    # The last group may reach beyond the last input: zeros stand there.
    padded = jnp.pad(weights, ((0, rules.group), (0, 0))) if rules.group > rules.block else weights

    def renew(_: Any) -> Any:
        return start_group(rows(padded, begin, rules.group), index)

    return jax.lax.cond(index % rules.group == 0, renew, _same, parameters)


def _same(value: Any) -> Any:
    return value


def _product(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
