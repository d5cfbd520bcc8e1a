"""Reference counting rules, against their definitions in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import pruning

RNG = np.random.default_rng(0)
SCORES = {"normal": RNG.random((9, 8)).astype(np.float32), "ties": RNG.integers(0, 5, (9, 8)).astype(np.float32)}


def _expected(scores, share, counting):
    flat = np.sort(scores.reshape(-1))
    if counting == "sparsegpt":
        place = int(flat.size * share)
        return scores > flat[place] if place < flat.size else np.zeros(scores.shape, bool)
    kept = max(1, round((1 - share) * flat.size))
    if counting == "tfmot":
        return scores >= flat[-kept]
    order = np.lexsort((-np.arange(scores.size), scores.reshape(-1)))
    mask = np.ones(scores.size, bool)
    mask[order[: scores.size - kept]] = False
    return mask.reshape(scores.shape)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("counting", ["sparsegpt", "tfmot", "jaxpruner"])
def test_against_the_definition(name, counting):
    for share in (0.0, 0.31, 0.5, 0.99, 1.0):
        found = pruning.masks_from_scores({"w": jnp.asarray(SCORES[name])}, sparsity=share, counting=counting)
        np.testing.assert_array_equal(found["w"], _expected(SCORES[name], share, counting), err_msg=str(share))


@pytest.mark.parametrize("counting", ["sparsegpt", "tfmot"])
def test_in_global_and_row_scope(counting):
    scores = {name: jnp.asarray(values) for name, values in SCORES.items()}
    found = pruning.masks_from_scores(scores, sparsity=0.4, counting=counting, scope="global")
    wanted = _expected(np.stack(list(SCORES.values())), 0.4, counting)
    np.testing.assert_array_equal(np.stack(list(found.values())), wanted)
    found = pruning.masks_from_scores(scores, sparsity=0.4, counting=counting, scope="row")
    for name, values in SCORES.items():
        for column in range(8):
            wanted = _expected(values[:, column], 0.4, counting)
            np.testing.assert_array_equal(found[name][:, column], wanted)


def test_mistakes_are_named():
    scores = {"w": jnp.ones((4, 4))}
    with pytest.raises(ValueError, match="goes with the unstructured pattern only"):
        pruning.masks_from_scores(scores, counting="tfmot", pattern=pruning.n_of_m(2, 4))
    with pytest.raises(ValueError, match="needs a concrete sparsity"):
        jax.jit(lambda s: pruning.masks_from_scores(scores, sparsity=s, counting="tfmot"))(0.5)
    with pytest.raises(ValueError, match='With `scope="global"` one `sparsity`'):
        pruning.masks_from_scores(scores, sparsity={"w": 0.5}, scope="global")
    with pytest.raises(ValueError, match=r"`sparsity` must be in \[0, 1\], got 1.2") as caught:
        pruning.masks_from_scores(scores, sparsity={"w": 1.2})
    assert "at leaf 'w'" in caught.value.__notes__
    with pytest.raises(ValueError, match="has an entry where there is nothing to prune") as caught:
        pruning.masks_from_scores(pruning.magnitude_scores(scores | {"b": jnp.ones(3)}), sparsity={"w": 0.5, "b": 0.5})
    assert "at leaf 'b'" in caught.value.__notes__
    with pytest.raises(ValueError, match=r"at most 0.5, got 0.75"):
        pruning.masks_from_scores(scores, sparsity={"w": 0.75}, pattern=pruning.n_of_m(2, 4))


def test_a_sparsity_per_leaf_may_be_traced():
    scores = {name: jnp.asarray(values) for name, values in SCORES.items()}
    shares = {"normal": 0.25, "ties": 0.75}
    traced = jax.jit(lambda scores, shares: pruning.masks_from_scores(scores, sparsity=shares))(scores, shares)
    wanted = pruning.masks_from_scores(scores, sparsity=shares)
    for name in scores:
        np.testing.assert_array_equal(traced[name], wanted[name])
        assert int((~traced[name]).sum()) == round(shares[name] * 72)
