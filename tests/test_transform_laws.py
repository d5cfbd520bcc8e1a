"""The laws of the contract, on every transform there is."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optimized import OPTIONS
from transform_table import TABLE, batch, model, params, run, trained

import jaxcompress as jc
from jaxcompress._src.tree.maps import leaf_paths
from jaxcompress._src.tree.unselected import is_unselected
from jaxcompress._src.types import TransformState, is_compressed
from jaxcompress.arrays import InputQuantizedArray, LowRankArray, QuantizedArray
from jaxcompress.checkpoint import restore, save
from jaxcompress.distillation import shard_by_rules
from jaxcompress.quantization import QuantSpec, quantization_aware, quantize
from jaxcompress.schedules import UnfinishedScheduleWarning
from jaxcompress.tree import by_path, leaves_with_paths

pytestmark = pytest.mark.parametrize("name", TABLE)


def _weights(tree):
    return [jc.materialize(tree[layer]["kernel"]) for layer in ("first", "second")]


def _leaves(tree):
    """Compressed leaves count as one: a transform keeps what they stand for."""
    return [leaf for _, leaf in leaves_with_paths(tree)]


def _assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def _assert_equal(name, found, expected):
    if TABLE[name].exact:
        return _assert_same(found, expected)
    return jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), found, expected)


def test_one_trace_over_all_steps(name):
    _, state, traces = trained(name)
    assert traces == 1
    assert int(state.step) == 5


def test_apply_keeps_structure_shapes_and_dtypes(name):
    transform, state, _ = trained(name)
    effective = transform.apply(state.params, state.transform_state)
    assert leaf_paths(effective) == leaf_paths(state.params)
    for x, y in zip(_leaves(effective), _leaves(params()), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.params)
    narrow = transform.apply(half, state.transform_state)
    assert {leaf.dtype for leaf in _leaves(narrow)} == {jnp.dtype("bfloat16")}
    for x, y in zip(_weights(narrow), _weights(effective), strict=True):
        assert bool((x[y == 0] == 0).all())


def test_a_leaf_that_is_compressed_before_goes_through_untouched(name):
    """Through every function. Traced, a leaf that is passed on is the same object, and nothing is compiled."""
    row = TABLE[name]
    transform, tree = row.make(), quantize(params(), QuantSpec(bits=8), select=by_path("second/kernel"))[0]
    stored = tree["second"]["kernel"]

    def assert_untouched(found, given):
        leaf = found["second"]["kernel"]
        leaf = leaf.weight if isinstance(leaf, InputQuantizedArray) else leaf
        leaf = leaf.residual if isinstance(leaf, LowRankArray) else leaf
        assert jax.tree.structure(leaf) == jax.tree.structure(given["second"]["kernel"])
        assert all(x is y for x, y in zip(*map(jax.tree.leaves, (leaf, given["second"]["kernel"])), strict=True))

    if "per leaf" in name:
        with pytest.raises(ValueError, match="has an entry where there is nothing to prune"):
            _updated(transform, tree, transform.init(tree, key=jax.random.key(3)))
        return
    state = transform.init(tree, key=jax.random.key(3), statistics=row.statistics())

    def step(tree, state):
        assert_untouched(transform.apply(tree, state), tree)
        assert_untouched(transform.apply(tree, state, key=jax.random.key(1)), tree)
        transform.penalty(state, tree, loss=jnp.float32(0.3))
        state, _ = _updated(transform, tree, state)
        projected, state = transform.project(tree, state)
        assert_untouched(projected, tree)
        return projected, state

    assert isinstance(stored, QuantizedArray)
    after = jax.eval_shape(step, tree, state)
    assert jax.tree.structure(after) == jax.tree.structure((tree, state))
    assert [leaf.shape for leaf in jax.tree.leaves(after)] == [leaf.shape for leaf in jax.tree.leaves((tree, state))]
    with warnings.catch_warnings():
        # Nothing was trained, so that schedules have not ended.
        warnings.simplefilter("ignore", UnfinishedScheduleWarning)
        assert_untouched(transform.finalize(tree, state), tree)


def test_a_state_can_be_made_without_values(name):
    """`jax.eval_shape` gives its structure, for a sharded start; values to share are found on the host only."""
    row = TABLE[name]
    if row.variant:
        return
    transform, statistics = row.make(), row.statistics()

    def init(params, key):
        return transform.init(params, key=key, statistics=statistics)

    if "codebooks" in name:
        with pytest.raises(TypeError, match="on the host only"):
            jax.eval_shape(init, params(), jax.random.key(3))
        return
    abstract, state = jax.eval_shape(init, params(), jax.random.key(3)), init(params(), jax.random.key(3))
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for shape, leaf in zip(*map(jax.tree.leaves, (abstract, state)), strict=True):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)


def _updated(transform, tree, state):
    grads = (tree,) * len(transform.stages) if transform.stages else tree
    return transform.update(grads, state, tree, key=jax.random.key(6), loss=jnp.float32(0.3))


def test_zeros_are_as_many_as_asked(name):
    transform, state, _ = trained(name)
    effective = transform.apply(state.params, state.transform_state)
    zeros = sum(int((w == 0).sum()) for w in _weights(effective))
    total, wanted = sum(w.size for w in _weights(effective)), TABLE[name].zeros
    if isinstance(wanted, tuple):
        assert wanted[0] <= zeros / total <= wanted[1]
    else:
        assert zeros == round(wanted * total)


def test_jit_equals_eager(name):
    transform, state, _ = trained(name)
    for key in (None, jax.random.key(5)):
        eager = transform.apply(state.params, state.transform_state, key=key)
        jitted = jax.jit(lambda p, s, key=key: transform.apply(p, s, key=key), compiler_options=OPTIONS)
        jitted = jitted(state.params, state.transform_state)
        _assert_equal(name, jitted, eager)
    grads = jax.tree.map(lambda w: jnp.sin(50 * w), state.params)
    stage_grads = (grads,) * len(transform.stages) if transform.stages else grads

    def after(tree, inner):
        inner, fresh = transform.update(stage_grads, inner, tree, key=jax.random.key(6), loss=jnp.float32(0.3))
        return transform.project(tree, inner), fresh

    (tree, inner), fresh = after(state.params, state.transform_state)
    (jitted_tree, jitted_inner), jitted_fresh = jax.jit(after)(state.params, state.transform_state)
    _assert_same((inner, fresh), (jitted_inner, jitted_fresh))
    for x, y in zip(jax.tree.leaves(jitted_tree), jax.tree.leaves(tree), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=1e-5)
    marks = [] if fresh is None else jax.tree.leaves(fresh, is_leaf=is_unselected)
    for mark, leaf in zip(marks, jax.tree.leaves(state.params), strict=fresh is not None):
        assert is_unselected(mark) or (mark.shape == leaf.shape and mark.dtype == bool)
    penalty = transform.penalty(state.transform_state, state.params, loss=jnp.float32(0.3))
    assert jnp.shape(penalty) == ()
    assert np.isfinite(penalty)


def test_what_is_stored_is_what_was_trained(name):
    transform, state, _ = trained(name)
    effective = jax.jit(transform.apply)(state.params, state.transform_state)
    final = transform.finalize(state.params, state.transform_state)
    _assert_equal(name, *(jax.jit(jc.materialize)(tree) for tree in (final, effective)))
    x = batch()["x"]
    served, trained_outputs = (jax.jit(jc.execute(model))(tree, x) for tree in (final, effective))
    np.testing.assert_allclose(served, trained_outputs, rtol=1e-4, atol=1e-5)


SR_STE = functools.partial(jc.pruning.sr_ste, 2, 4)


@pytest.mark.parametrize(
    "later",
    [
        lambda: quantization_aware(QuantSpec(bits=4, group_size=8)),
        lambda: quantization_aware(QuantSpec(bits=3, symmetric=False)),
        SR_STE,
        lambda: toys.toy_scale(0.7),
    ],
)
def test_zeros_stay_zero_through_later_transforms(name, later):
    transform, state, _ = trained(name)
    before = transform.apply(state.params, state.transform_state)
    second = later()
    kernels = [leaf for _, leaf in leaves_with_paths(before) if leaf.ndim >= 2]
    if later is SR_STE and all(is_compressed(leaf) for leaf in kernels):
        # It takes plain leaves only, and says so where an earlier transform left it none.
        with pytest.raises(ValueError, match="compressed already"):
            second.init(before, key=jax.random.key(0))
        return
    after = second.apply(before, second.init(before, key=jax.random.key(0)))
    for x, y in zip(_weights(before), _weights(after), strict=True):
        assert bool((y[x == 0] == 0).all())


def test_state_is_strongly_typed_and_survives_a_checkpoint(name, tmp_path):
    _, state, _ = trained(name)
    inner = state.transform_state
    assert isinstance(inner, TransformState)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(inner))
    save(tmp_path / "state", {"state": inner, "params": state.params})
    found, _ = restore(tmp_path / "state", like={"state": inner, "params": state.params})
    _assert_same(found["state"], inner)


@pytest.mark.parametrize("axes", ["data", "fsdp", "data x tensor"])
def test_one_and_eight_devices_agree(name, axes):
    """The step is compiled once, ahead: it would refuse a state that does not stay where it lies."""
    if TABLE[name].variant:
        return
    shape, spec = {"data": ((8, 1), P()), "fsdp": ((8, 1), P(None, "data")), "data x tensor": ((4, 2), P("tensor"))}[
        axes
    ]
    mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    _, alone, _ = trained(name)
    rows, texts = NamedSharding(mesh, P("data")), []

    def place(tree):
        return shard_by_rules(tree, mesh, [(".*kernel", spec), (".*bias", P())])

    _, spread, traces = run(TABLE[name], place, lambda tree: jax.device_put(tree, rows), texts)
    assert traces == 1
    assert len(spread.params["first"]["kernel"].sharding.device_set) == 8
    for x, y in zip(
        jax.tree.leaves((alone.params, alone.transform_state)),
        jax.tree.leaves((spread.params, spread.transform_state)),
        strict=True,
    ):
        np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(x, np.float32), rtol=1e-5, atol=1e-5)
    if axes == "fsdp":
        _check_shares(spread.transform_state)
        _check_gathers(name, texts[0])


def _check_shares(state):
    """Vectors over units, ranks and tables are whole; everything else is shared out."""
    leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.size > 24]
    share = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    assert share <= (1 / 8 + 0.02) * sum(leaf.nbytes for leaf in leaves)


def _check_gathers(name, text):
    """Gathered are the two kernels that the model multiplies with, no mask, score or code."""
    gathers = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather\(", text)
    large = [(kind, shape) for kind, shape in gathers if np.prod([int(n) for n in shape.split(",") if n]) >= 16 * 24]
    assert {kind for kind, _ in gathers} <= {"f32", "u32", "s32"}
    assert set(large) <= {("f32", "16,24"), ("f32", "24,16")}
    # Where tables begin in mid-training, they are fitted to weights as a whole, once.
    assert len(large) <= (4 if name == "gradual, then codebooks" else 2)
