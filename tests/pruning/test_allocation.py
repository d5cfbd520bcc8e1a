"""Budgets over leaves: exact totals, proportions, dense layers, measured sensitivity against trying everything."""

import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import pruning, tree
from jaxcompress._src.pruning.allocation import erdos_renyi_kernel, global_rank
from jaxcompress._src.pruning.masks import magnitude_masks
from jaxcompress._src.pruning.normalize import normalized_scores
from jaxcompress._src.pruning.sparsity import leaf_sparsities, sparsity_of
from jaxcompress.trace import LeafLayout

ALLOCATIONS = [pruning.uniform, pruning.erdos_renyi, erdos_renyi_kernel]


def _shapes(*shapes):
    return {str(i): jax.ShapeDtypeStruct(shape, "float32") for i, shape in enumerate(shapes)}


@pytest.mark.parametrize("allocate", ALLOCATIONS)
@hypothesis.given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=5), st.floats(0, 1))
@hypothesis.settings(max_examples=60, deadline=None)
def test_totals_are_exact(allocate, shapes, sparsity):
    found = allocate(_shapes(*shapes), sparsity=sparsity)
    sizes = [a * b for a, b in shapes]
    counts = [round(share * size) for share, size in zip(found.values(), sizes, strict=True)]
    assert sum(counts) == round(sparsity * sum(sizes))
    assert all(0 <= share <= 1 for share in found.values())


def test_kept_counts_are_those_of_masks():
    params = {"a": jnp.ones((7, 30)), "b": jnp.ones((30, 3)), "bias": jnp.ones(3)}
    shares = pruning.erdos_renyi(params, sparsity=0.7)
    assert shares["bias"] is tree.Unselected
    masks = magnitude_masks(params, sparsity=shares)
    assert sparsity_of(masks) == 210 / 300
    assert leaf_sparsities(masks) == pytest.approx(shares)


def test_erdos_renyi_by_hand():
    found = pruning.erdos_renyi(_shapes((20, 300), (300, 100)), sparsity=0.9)
    densities = [1 - share for share in found.values()]
    assert densities[0] / densities[1] == pytest.approx((320 / 6000) / (400 / 30000), rel=1e-2)


def test_layouts_say_what_the_axes_are():
    """Stacked layers are layers of their own, and heads are multiplied out."""
    heads = LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2, 3))
    flat = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
    params = _shapes((6, 64, 4, 16), (64, 256))
    for allocate in (pruning.erdos_renyi, erdos_renyi_kernel):
        found = allocate(params, sparsity=0.9, layouts={"0": heads, "1": flat})
        densities = [1 - share for share in found.values()]
        assert densities[0] / densities[1] == pytest.approx((128 / 4096) / (320 / 16384), rel=1e-3)
    conv = LeafLayout(kind="conv", input_axes=(0, 1, 2), output_axes=(3,))
    found = erdos_renyi_kernel(_shapes((3, 3, 64, 64), (64, 256)), sparsity=0.9, layouts={"0": conv, "1": flat})
    assert (1 - found["0"]) / (1 - found["1"]) == pytest.approx((134 / 36864) / (320 / 16384), rel=1e-3)


def test_global_rank_and_normalised_scores():
    rng = np.random.default_rng(0)
    scores = {
        "small": jnp.asarray(rng.random((20, 10)), jnp.float32),
        "large": jnp.asarray(9 * rng.random((20, 10)), jnp.float32),
    }
    plain = global_rank(scores, sparsity=0.5)
    assert plain["small"] > 0.85
    for by in ("mean", "l2", "lamp"):
        even = global_rank(normalized_scores(scores, by=by), sparsity=0.5)
        assert abs(even["small"] - 0.5) < 0.1
        assert sum(round(share * 200) for share in even.values()) == 200
    zero = normalized_scores({"w": jnp.zeros((2, 3))}, by="lamp")["w"]
    assert zero.tolist() == [[0.0] * 3] * 2


def test_lamp_against_its_definition():
    rng = np.random.default_rng(1)
    for score in (rng.random((7, 9)) * 1e-25, rng.integers(0, 4, size=(5, 6)).astype(float)):
        found = np.asarray(normalized_scores({"w": jnp.asarray(score, jnp.float32)}, by="lamp")["w"], np.float64)
        flat = score.reshape(-1)
        order = np.lexsort((-np.arange(flat.size), flat))
        wanted = np.zeros(flat.size)
        for place, i in enumerate(order):
            left = (flat[order[place:]] ** 2).sum()
            wanted[i] = flat[i] ** 2 / left if left else 0.0
        np.testing.assert_allclose(found.reshape(-1), wanted, rtol=1e-4, atol=1e-7)
        assert found.max() == 1.0


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"`sparsity` must be in \[0, 1\], got 1.5"):
        pruning.uniform(_shapes((2, 2)), sparsity=1.5)
    with pytest.raises(ValueError, match="not negative") as caught:
        normalized_scores({"w": -jnp.ones(2)}, by="lamp")
    assert "at leaf 'w'" in caught.value.__notes__


def _quadratic(sizes=(6, 4, 5), seed=0):
    """A loss that is a sum over leaves of Σ c (w - w0)²: pruning a leaf costs what its weights are worth."""
    rng = np.random.default_rng(seed)
    params = {str(i): jnp.asarray(rng.normal(size=(size, 2)), jnp.float32) for i, size in enumerate(sizes)}
    worth = {str(i): float(10.0 ** rng.uniform(-1, 1)) for i in range(len(sizes))}

    def loss(tree_, x):
        return sum(x * worth[name] * jnp.square(tree_[name] - params[name]).sum() for name in params)

    return loss, params


def test_by_sensitivity_is_the_best_point_of_the_grid():
    loss, params = _quadratic()
    grid = (0.25, 0.5, 0.75, 1.0)
    table = pruning.loss_sensitivity(loss, params, [1.0, 3.0], pruning.magnitude_scores(params), grid=grid)
    assert table.sizes == {"0": 12, "1": 8, "2": 10}
    for name, leaf in params.items():
        masks = magnitude_masks({name: leaf}, sparsity=0.5)
        pruned = np.asarray(leaf)[~np.asarray(masks[name])]
        ratio = float(loss({**params, name: jnp.zeros_like(leaf)}, 2.0)) / float(np.square(leaf).sum())
        np.testing.assert_allclose(table.losses[name][2], ratio * (pruned**2).sum(), rtol=1e-5)
    sizes = [12, 8, 10]
    for sparsity in (0.0, 0.3, 0.6, 1.0):
        shares = pruning.by_sensitivity(table, sparsity=sparsity)
        pruned = [round(share * size) for share, size in zip(shares.values(), sizes, strict=True)]
        assert sum(pruned) == round(sparsity * 30)
        best = min(
            sum(table.losses[str(i)][o] for i, o in enumerate(options))
            for options in itertools.product(range(5), repeat=3)
            if sum(table.pruned[str(i)][o] for i, o in enumerate(options)) >= round(sparsity * 30)
        )
        between = sum(np.interp(count, table.pruned[str(i)], table.losses[str(i)]) for i, count in enumerate(pruned))
        assert between <= best + 1e-6


def test_by_sensitivity_beats_uniform_where_leaves_differ():
    loss, params = _quadratic(sizes=(40, 30, 50), seed=3)
    scores = pruning.magnitude_scores(params)
    shares = pruning.by_sensitivity(pruning.loss_sensitivity(loss, params, [1.0], scores), sparsity=0.6)
    found = [
        float(loss(pruning.apply_masks(params, pruning.masks_from_scores(scores, sparsity=s)), 1.0))
        for s in (shares, pruning.uniform(params, sparsity=0.6))
    ]
    assert found[0] < 0.8 * found[1]


def test_sensitivity_mistakes_are_named():
    loss, params = _quadratic()
    scores = pruning.magnitude_scores(params)
    with pytest.raises(ValueError, match="`batches` is empty"):
        pruning.loss_sensitivity(loss, params, [], scores)
    with pytest.raises(ValueError, match="`grid` must ascend"):
        pruning.loss_sensitivity(loss, params, [1.0], scores, grid=(0.5, 0.2))
    with pytest.raises(ValueError, match=r"The loss is nan at sparsity 0.5") as caught:
        pruning.loss_sensitivity(lambda p, x: jnp.log(p["0"]).sum() * 0, params, [1.0], scores, grid=(0.5,))
    assert "at leaf '0'" in caught.value.__notes__
    table = pruning.loss_sensitivity(loss, params, [1.0], scores, grid=(0.5,))
    with pytest.raises(ValueError, match=r"The grid reaches a sparsity of 0.5, below the 0.9"):
        pruning.by_sensitivity(table, sparsity=0.9)
