"""Ranking by counting, against stable sorts in NumPy."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcompress._src.solvers.counting import count_true, fold_factor
from jaxcompress._src.solvers.order import order_keys
from jaxcompress._src.solvers.rank import keep_largest
from jaxcompress._src.solvers.runs import keep_in_runs
from jaxcompress._src.solvers.search import search_threshold


def _keep(leaves, dropped):
    """Sorts by score, then from the last index on; NaN sorts last."""
    flat = np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in leaves])
    order = np.lexsort((-np.arange(flat.size), flat))
    kept = np.ones(flat.size, bool)
    kept[order[:dropped]] = False
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    return [part.reshape(leaf.shape) for part, leaf in zip(np.split(kept, ends), leaves, strict=True)]


def _leaves(rng, kind, dtype):
    shapes = [(), (1,), (0, 4), (37, 21), (5, 3, 4)]
    make = {
        "normal": lambda shape: rng.normal(size=shape),
        "ties": lambda shape: rng.integers(-3, 4, size=shape),
        "equal": lambda shape: np.full(shape, -2.0),
        "zero": lambda shape: np.where(rng.random(shape) < 0.5, 0.0, -0.0),
        "tiny": lambda shape: rng.normal(size=shape) * 1e-40,
        "wild": lambda shape: np.where(rng.random(shape) < 0.1, np.nan, np.exp(20 * rng.normal(size=shape))),
    }[kind]
    return [jnp.asarray(make(shape), dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "zero", "tiny", "wild"])
def test_masks_equal_a_stable_sort(kind, dtype):
    leaves = _leaves(np.random.default_rng(0), kind, dtype)
    total = sum(leaf.size for leaf in leaves)
    # NumPy widens on the host: denormal numbers survive, which XLA's own conversion may flush.
    values = [np.asarray(leaf).astype(np.float64) for leaf in leaves]
    for dropped in (0, 1, total // 3, total - 1, total):
        for found, wanted in zip(keep_largest(leaves, dropped), _keep(values, dropped), strict=True):
            np.testing.assert_array_equal(found, wanted)
    counts = [leaf.size // 2 for leaf in leaves]
    axes = tuple(tuple(range(leaf.ndim)) for leaf in leaves)
    for found, value, count in zip(keep_largest(leaves, jnp.array(counts), axes=axes), values, counts, strict=True):
        np.testing.assert_array_equal(found, _keep([value], count)[0])


@hypothesis.given(st.integers(1, 4), st.integers(0, 2**32 - 1), st.floats(0, 1))
@hypothesis.settings(max_examples=25, deadline=None)
def test_exactly_the_asked_count_under_ties(levels, seed, share):
    leaves = [
        jnp.asarray(np.random.default_rng(seed).integers(0, levels, size=s), jnp.float32) for s in ((9, 7), (30,))
    ]
    dropped = round(share * 93)
    for found, wanted in zip(keep_largest(leaves, dropped), _keep(leaves, dropped), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 2), ()])
def test_groups_over_some_axes(axes):
    scores = np.random.default_rng(1).integers(0, 4, size=(6, 5, 7)).astype(np.float32)
    size = int(np.prod([scores.shape[axis] for axis in axes], dtype=int))
    dropped = size // 2
    mask = keep_largest([jnp.asarray(scores)], jnp.array([dropped]), axes=(axes,))[0]
    others = [axis for axis in range(3) if axis not in axes]
    order = (*others, *axes)
    lines, kept = (np.transpose(x, order).reshape(-1, size) for x in (scores, np.asarray(mask)))
    for line, found in zip(lines, kept, strict=True):
        np.testing.assert_array_equal(found, _keep([line], dropped)[0])


def test_a_traced_count_compiles_once_and_scores_are_computed_inside():
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(40, 30)), jnp.float32)
    traces = []

    @jax.jit
    def masks(weights, dropped):
        traces.append(1)
        return keep_largest([weights], dropped, score=jnp.abs)[0]

    for dropped in (0, 7, 600, 1200):
        np.testing.assert_array_equal(masks(weights, dropped), _keep([np.abs(weights)], dropped)[0])
    assert len(traces) == 1


def test_the_search_is_bounded_however_bad_the_guesses():
    keys = np.sort(np.random.default_rng(3).integers(0, 2**32 - 2**16, size=50, dtype=np.uint64)).astype(np.uint32)
    for rank in (1, 25, 49):
        steps = []

        def count(key, steps=steps):
            steps.append(1)
            return jnp.asarray([(keys < np.asarray(key)[0]).sum()], jnp.int32)

        misleading = jnp.array([0xFFFF0000], jnp.uint32)
        with jax.disable_jit():
            found = search_threshold(
                count, jnp.array([rank]), jnp.array([50]), (misleading, misleading), last=0xFFFF0000
            )
        assert int(found.below[0]) <= rank <= int(found.below[0]) + int(found.ties[0])
        assert len(steps) <= 34


def test_no_copy_of_the_leaves_is_made():
    shape = jax.ShapeDtypeStruct((1024, 768), jnp.float32)
    compiled = jax.jit(lambda x, k: keep_largest([x], k, score=jnp.abs)).lower(shape, jnp.int32(5)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.3 * 1024 * 768


def test_sharded_leaves_give_the_same_masks_and_are_not_gathered():
    rng = np.random.default_rng(4)
    leaves = [
        jnp.asarray(rng.normal(size=(1024, 64)), jnp.float32),
        jnp.asarray(rng.integers(0, 9, (64, 512)), "float32"),
    ]
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    specs = [PartitionSpec("model", None), PartitionSpec(None, "model")]
    placed = [jax.device_put(leaf, NamedSharding(mesh, spec)) for leaf, spec in zip(leaves, specs, strict=True)]
    ranked = jax.jit(lambda leaves, dropped: keep_largest(leaves, dropped))
    for dropped in (30000, 70001):
        for found, wanted in zip(ranked(placed, dropped), _keep(leaves, dropped), strict=True):
            np.testing.assert_array_equal(found, wanted)
    text = ranked.lower(placed, 30000).compile().as_text()
    results = [line.split("all-gather(")[0] for line in text.splitlines() if "all-gather(" in line]
    assert not [result for result in results if any(s in result for s in ("1024,64]", "64,512]", "65536]", "32768]"))]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (3, 3)])
def test_runs_keep_the_n_largest_and_a_short_one_what_it_has(axis, n, m):
    scores = np.random.default_rng(5).integers(0, 4, size=(10, 13)).astype(np.float32)
    mask = keep_in_runs(jnp.asarray(scores), n, m, axis=axis)
    for line, found in zip(np.moveaxis(scores, axis, 1), np.moveaxis(np.asarray(mask), axis, 1), strict=True):
        for start in range(0, line.size, m):
            run = line[start : start + m]
            np.testing.assert_array_equal(found[start : start + m], _keep([run], max(run.size - n, 0))[0])


def test_counts_and_keys():
    mask = np.random.default_rng(6).random((96, 128)) < 0.3
    np.testing.assert_array_equal(count_true(jnp.asarray(mask)), [[mask.sum()]])
    np.testing.assert_array_equal(count_true(jnp.asarray(mask), (1,)), mask.sum(1, keepdims=True))
    assert [fold_factor(size) for size in (768, 4096, 30522, 50257, 7, 1)] == [24, 16, 6, 29, 1, 1]
    with pytest.raises(TypeError, match="Scores must be floats, got int32"):
        order_keys(jnp.arange(3))


def test_too_many_weights_are_an_error_before_anything_runs():
    shape = jax.ShapeDtypeStruct((2**16, 2**14), jnp.float32)
    with pytest.raises(ValueError, match="at most"):
        jax.eval_shape(lambda a, b: keep_largest([a, b], 5), shape, shape)
    jax.eval_shape(lambda a, b: keep_largest([a, b], jnp.array([5, 5]), axes=((0, 1), (0, 1))), shape, shape)
