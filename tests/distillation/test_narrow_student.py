"""Students that begin as their teacher with narrower layers: the units that matter most."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import structured
from jaxcompress._src.units.shrink import mask_units
from jaxcompress.models import from_pretrained, resized, unit_groups

KINDS = ("heads", "columns", "hidden")
RNG = np.random.default_rng(0)
BATCH = {"ids": RNG.integers(5, 17, (8, 6)), "labels": RNG.integers(0, 2, 8)}


@pytest.fixture(scope="module")
def teacher(bert_directory):
    module, params = from_pretrained(bert_directory)
    return module, jax.tree.map(lambda leaf: 4 * leaf if leaf.ndim > 1 else leaf, params)


@functools.cache
def compiled(module):
    return jax.jit(lambda params, ids: module.apply({"params": params}, ids)["logits"])


def divergence(teacher, student):
    logits = (compiled(module)(params, BATCH["ids"]) for module, params in (teacher, student))
    p, q = (jax.nn.log_softmax(each) for each in logits)
    return float((jnp.exp(p) * (p - q)).sum(-1).mean())


def importance(teacher, groups):
    module, params = teacher

    def loss(params, batch):
        log_probabilities = jax.nn.log_softmax(module.apply({"params": params}, batch["ids"])["logits"])
        return -jnp.take_along_axis(log_probabilities, batch["labels"][:, None], axis=1).mean()

    return structured.fisher_unit_scores(structured.gate_gradients(loss, params, groups, [BATCH]))


def narrowed(teacher, scores, groups, **shape):
    module, params = teacher
    keep = structured.select_units(scores, groups, params, shape=shape).keep
    small = structured.shrink(params, groups, keep)
    return resized(module, small), small


def test_units_without_effect_are_those_that_go(teacher):
    module, params = teacher
    groups = unit_groups(module.config)
    rng = np.random.default_rng(1)
    effect = {group.name: rng.permutation(group.count) >= group.count // 2 for group in groups}
    planted = mask_units(params, groups, effect)
    scores = importance((module, planted), groups)
    for name, score in scores.items():
        np.testing.assert_array_equal(np.asarray(score) > 0, effect[name], err_msg=name)
    student = narrowed((module, planted), scores, groups, heads=2, columns=32)
    assert student[0].config.num_attention_heads == (2, 2)
    assert student[0].config.intermediate_size == (32, 32)
    logits = (compiled(each)(tree, BATCH["ids"]) for each, tree in ((module, planted), student))
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_important_units_are_worth_more_than_random_ones(teacher, kind):
    module, params = teacher
    groups = unit_groups(module.config, kinds=[kind])
    scores, count = importance(teacher, groups), groups[0].count
    by_importance = divergence(teacher, narrowed(teacher, scores, groups, **{kind: count // 2}))
    rng = np.random.default_rng(2)
    at_random = [
        narrowed(teacher, {group.name: rng.random(count) for group in groups}, groups, **{kind: count // 2})
        for _ in range(5)
    ]
    assert by_importance < np.mean([divergence(teacher, student) for student in at_random])
    whole, same = narrowed(teacher, scores, groups, **{kind: count})
    assert whole.config == module.config
    jax.tree.map(np.testing.assert_array_equal, same, params)
