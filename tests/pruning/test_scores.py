"""Scores from evidence against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import pruning, tree
from jaxcompress._src.pruning.evidence_scores import add_movement, movement_scores
from jaxcompress._src.pruning.patterns import Unstructured

RNG = np.random.default_rng(0)
PARAMS = {
    "a": {"kernel": jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32), "bias": jnp.ones(4)},
    "b": {"kernel": jnp.asarray(RNG.normal(size=(4, 5)), jnp.bfloat16), "bias": jnp.ones(5)},
}
EVIDENCE = jax.tree.map(lambda w: jnp.asarray(RNG.normal(size=w.shape), jnp.float32), PARAMS)


def _kernel(layer, values):
    return np.asarray(values[layer]["kernel"]).astype(np.float64)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (pruning.taylor_scores, lambda w, g: np.abs(w * g)),
        (lambda p, g: pruning.fisher_scores(p, jax.tree.map(jnp.square, g)), lambda w, g: w**2 * g**2 / 2),
        (lambda p, g: movement_scores(p, add_movement(None, p, g)), lambda w, g: -w * g),
    ],
)
def test_against_numpy(make, expected):
    scores = make(PARAMS, EVIDENCE)
    for layer in PARAMS:
        wanted = expected(_kernel(layer, PARAMS), _kernel(layer, EVIDENCE))
        np.testing.assert_allclose(scores[layer]["kernel"], wanted, rtol=1e-6)
        assert scores[layer]["kernel"].dtype == jnp.float32
        assert scores[layer]["bias"] is tree.Unselected


def test_snip_adds_up_to_one_over_all_leaves():
    scores = pruning.snip_scores(PARAMS, EVIDENCE)
    products = [np.abs(_kernel(layer, PARAMS) * _kernel(layer, EVIDENCE)) for layer in PARAMS]
    for layer, product in zip(PARAMS, products, strict=True):
        np.testing.assert_allclose(scores[layer]["kernel"], product / sum(p.sum() for p in products), rtol=1e-5)
    nothing = pruning.snip_scores(PARAMS, jax.tree.map(jnp.zeros_like, EVIDENCE))
    assert float(nothing["a"]["kernel"].sum()) == 0.0


def test_movement_accumulates_over_the_steps_of_a_training():
    add = jax.jit(add_movement)
    total, wanted, params = None, 0.0, PARAMS
    for step in range(3):
        gradients = jax.tree.map(lambda g, step=step: g * (step + 1), EVIDENCE)
        total = add(total, params, gradients)
        wanted = wanted - _kernel("a", params) * _kernel("a", gradients)
        params = jax.tree.map(lambda w, g: (w - 0.1 * g).astype(w.dtype), params, gradients)
    np.testing.assert_allclose(total["a"]["kernel"], wanted, rtol=1e-5)


def test_random_scores_differ_between_leaves_and_keys():
    params = {"a": jnp.ones((4, 5)), "b": jnp.ones((4, 5))}
    first, second = (pruning.random_scores(params, key=jax.random.key(seed)) for seed in (0, 1))
    assert len({float(scores[name].sum()) for scores in (first, second) for name in params}) == 4


@pytest.mark.parametrize("scope", ["leaf", "global", "row"])
@pytest.mark.parametrize("pattern", [pruning.unstructured(), pruning.n_of_m(2, 4), pruning.block(2, 2)])
def test_every_score_goes_with_every_scope_and_pattern(scope, pattern):
    """Counts are exact; 24 and 20 weights divide into all units."""
    for scores in (
        pruning.taylor_scores(PARAMS, EVIDENCE),
        movement_scores(PARAMS, EVIDENCE),
        pruning.snip_scores(PARAMS, EVIDENCE),
        pruning.random_scores(PARAMS, key=jax.random.key(0)),
    ):
        masks = pruning.masks_from_scores(scores, sparsity=0.25, scope=scope, pattern=pattern)
        kept = [int(masks[layer]["kernel"].sum()) for layer in PARAMS]
        if isinstance(pattern, Unstructured) and scope != "row":
            assert sum(kept) == 33
        # Runs and tiles round by themselves: a row of two tiles keeps both or one.
        assert 22 <= sum(kept) <= 44


def test_mistakes_name_the_leaf():
    partial = {"a": EVIDENCE["a"], "b": {"kernel": tree.Unselected, "bias": tree.Unselected}}
    with pytest.raises(ValueError, match="`gradients` has no entry for the leaf") as caught:
        pruning.taylor_scores(PARAMS, partial)
    assert "at leaf 'b/kernel'" in caught.value.__notes__
    turned = jax.tree.map(lambda g: g.T, EVIDENCE)
    with pytest.raises(ValueError, match=r"`fisher` has shape \(4, 6\) where the leaf has \(6, 4\)"):
        pruning.fisher_scores(PARAMS, jax.tree.map(jnp.square, turned))
    with pytest.raises(ValueError, match="negative entries at 'a/bias'"):
        pruning.fisher_scores(PARAMS, jax.tree.map(lambda g: -jnp.abs(g), EVIDENCE))
    broken = jax.tree.map(lambda g: g * jnp.nan, EVIDENCE)
    with pytest.raises(ValueError, match="Leaf 'a/kernel' holds 24 NaN"):
        movement_scores(PARAMS, broken)
