"""What primitives do to axes, against the primitives themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress._src.trace.axis_rules import axes_before, axis_runs, even_axes, free_axes, is_cast, operand_axes
from jaxcompress.calibration import input_statistics
from jaxcompress.trace import layouts
from jaxcompress.tree import Unselected

MOVES = {
    "transpose": ((2, 3, 4), lambda x: x.transpose(2, 0, 1)),
    "squeeze": ((2, 1, 4, 1), lambda x: jax.lax.squeeze(x, (1, -1))),
    "new axes": ((2, 3), lambda x: jax.lax.broadcast_in_dim(x, (4, 2, 1, 3), (1, 3))),
    "repeated": ((2, 1, 3), lambda x: jax.lax.broadcast_in_dim(x, (2, 5, 3), (0, 1, 2))),
    "merged": ((2, 3, 4), lambda x: jax.lax.reshape(x, (6, 4))),
    "split": ((6, 4), lambda x: jax.lax.reshape(x, (2, 3, 1, 4))),
    "both": ((4, 3, 5), lambda x: jax.lax.reshape(x, (2, 6, 5))),
    "cast": ((2, 3), lambda x: x.astype(jnp.float64 if x.dtype == jnp.bfloat16 else jnp.bfloat16)),
    "copy": ((2, 3), lambda x: jax.lax.reduce_precision(x, 8, 7)),
}
SELECTIONS = {
    "slice": ((4, 3), lambda x: jax.lax.slice(x, (1, 0), (4, 2))),
    "reversed": ((4, 3), lambda x: jax.lax.rev(x, (0,))),
}


def _equation(shape, move):
    (eqn,) = jax.make_jaxpr(move)(jnp.zeros(shape)).eqns
    return eqn


def _places(shape, axes):
    """The place along some axes, flattened in order, of each entry of an array."""
    total = np.zeros(shape, int)
    for axis in axes:
        total = total * shape[axis] + np.arange(shape[axis]).reshape(
            [-1 if k == axis else 1 for k in range(len(shape))]
        )
    return total


def _moved(move, x):
    return np.asarray(move(jnp.asarray(x, jnp.float32))).astype(int)


@pytest.mark.parametrize("name", MOVES)
def test_runs_hold_the_same_entries(name):
    shape, move = MOVES[name]
    runs, out = axis_runs(_equation(shape, move)), move(jnp.zeros(shape)).shape
    assert sorted(axis for old, _ in runs for axis in old) == list(range(len(shape)))
    assert sorted(axis for _, new in runs for axis in new) == list(range(len(out)))
    for old, new in runs:
        sizes = [int(np.prod([size[axis] for axis in axes])) for size, axes in ((shape, old), (out, new))]
        if sizes[0] == sizes[1]:
            np.testing.assert_array_equal(_moved(move, _places(shape, old)), _places(out, new))
        else:
            assert not old or sizes[0] == 1


@pytest.mark.parametrize("name", MOVES)
def test_the_way_back(name):
    shape, move = MOVES[name]
    eqn, out = _equation(shape, move), move(jnp.zeros(shape)).shape
    known = 0
    for axes in [
        (),
        *((axis,) for axis in range(len(out))),
        *((k, j) for k in range(len(out)) for j in range(len(out))),
    ]:
        before = None if len(set(axes)) < len(axes) else axes_before(eqn, axes)
        if before is not None:
            known += 1
            np.testing.assert_array_equal(_moved(move, _places(shape, before)), _places(out, axes))
    assert known > 1
    assert axes_before(_equation(*SELECTIONS["slice"]), (0,)) is None


@pytest.mark.parametrize("name", [*MOVES, *SELECTIONS])
def test_where_nothing_changes(name):
    """Along every set of axes; and no axis is forgotten."""
    shape, move = (MOVES | SELECTIONS)[name]
    eqn, out = _equation(shape, move), move(jnp.zeros(shape)).shape
    for chosen in range(2 ** len(shape)):
        even = frozenset(axis for axis in range(len(shape)) if chosen >> axis & 1)
        x = np.random.default_rng(chosen).integers(0, 200, [1 if axis in even else n for axis, n in enumerate(shape)])
        moved = _moved(move, np.broadcast_to(x, shape))
        same = {axis for axis in range(len(out)) if (moved == np.take(moved, [0], axis)).all()}
        found = even_axes(eqn, even)
        assert found <= same
        assert name == "both" or {axis for axis in same if out[axis] > 1} <= found


def test_casts_to_integers_make_other_values():
    assert not is_cast(_equation((2,), lambda x: x.astype(jnp.int32)))
    assert is_cast(_equation((2,), lambda x: x.astype(jnp.bfloat16)))
    assert not is_cast(_equation((2,), jnp.exp))
    assert axis_runs(_equation((2,), lambda x: x.astype(jnp.int32))) is None


@pytest.mark.parametrize("side", [0, 1])
def test_axes_of_a_product(side):
    numbers = (((1,), (3,)), ((2,), (0,)))
    shapes = (3, 5, 2, 4), (2, 6, 7, 5)

    def product(x, y):
        return jax.lax.dot_general(x, y, numbers)

    (eqn,) = jax.make_jaxpr(product)(*map(jnp.zeros, shapes)).eqns
    assert free_axes(eqn, side) == [[0, 3], [1, 2]][side]
    out = eqn.outvars[0].aval.shape
    for after, axis in operand_axes(eqn, side).items():
        operands = [jnp.ones(shape) for shape in shapes]
        operands[side] = jnp.asarray(_places(shapes[side], [axis]), jnp.float32)
        np.testing.assert_array_equal(product(*operands), 5 * _places(out, [after]))


def test_what_is_cut_out_of_several_parameters_is_of_one():
    """A parameter whose entries are all elsewhere has no part in it."""
    params = {name: jnp.ones((4, 4)) for name in ("first", "second", "unused")}

    def stacked(params, x):
        stack = jnp.stack([params["first"], params["second"], params["unused"]])
        return jnp.tanh(x @ stack[0]) @ stack[1]

    def joined(params, x):
        rows = jnp.concatenate([params["first"], params["second"], params["unused"]])
        return jnp.tanh(x @ rows[:4]) @ rows[4:8]

    def used(params):
        return {name: name != "unused" for name in params}

    x = jnp.eye(4)[:3]
    for apply in (stacked, joined):
        found = layouts(apply, params, x)
        assert [found[name].kind for name in params] == ["matmul", "matmul", "other"]
        assert found["first"].input_id != found["second"].input_id
        statistics = input_statistics(apply, params, [(x,)], select=used)
        np.testing.assert_allclose(statistics["first"].gram, x.T @ x)
        y = jnp.tanh(x @ params["first"])
        np.testing.assert_allclose(statistics["second"].gram, y.T @ y, rtol=1e-6)
        assert statistics["unused"] is Unselected
