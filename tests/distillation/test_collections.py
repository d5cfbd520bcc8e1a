"""Mutable collections: what the student renews itself."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.distillation import hard_labels, make_train_step
from jaxcompress.quantization import QuantSpec, quantization_aware
from jaxcompress.tree import by_path

RNG = np.random.default_rng(0)
X = np.asarray(5 + 2 * RNG.normal(size=(12, 5)), np.float32)
BATCH = {"x": jnp.asarray(X), "labels": jnp.arange(12) % 3}
LOSSES = {"hard": hard_labels()}


class Net(nn.Module):
    """A dense layer behind a norm, and one before another."""

    @nn.compact
    def __call__(self, x, train):
        """Logits."""
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="first")(x)
        x = nn.Dense(3, name="dense")(x)
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, name="last")(x)


NET = Net()


def _student(variables, batch, *, key, train):
    if not train:
        return {"logits": NET.apply(variables, batch["x"], False)}
    logits, new = NET.apply(variables, batch["x"], True, mutable=["batch_stats"])
    return {"logits": logits, **new}


def _variables():
    return jax.jit(NET.init, static_argnums=2)(jax.random.key(0), BATCH["x"], True)


def test_batch_norm_statistics_move_and_fold_into_the_quantized_kernel():
    """Weight decay and a transform of all kernels leave them alone; evaluation uses them."""
    transform = quantization_aware(QuantSpec(bits=4), select=by_path("params/.*kernel"))
    init_state, step = make_train_step(
        _student,
        None,
        optax.adamw(0.01, weight_decay=0.5),
        losses=LOSSES,
        transform=transform,
        mutable=("batch_stats",),
    )
    state = init_state(_variables(), key=jax.random.key(1))
    mean, var = np.zeros(5), np.ones(5)
    for _ in range(3):
        state, _ = step(state, None, BATCH)
        mean, var = 0.9 * mean + 0.1 * X.mean(0, dtype=np.float64), 0.9 * var + 0.1 * X.astype(np.float64).var(0)
    stats = state.params["batch_stats"]
    np.testing.assert_allclose(stats["first"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(stats["first"]["var"], var, rtol=1e-5)
    assert [leaf.shape for leaf in jax.tree.leaves(state.optimizer_state[0].mu)] == [
        leaf.shape for leaf in jax.tree.leaves(state.params["params"])
    ]
    # Both norms folded into the rounded kernel by hand, in float64.
    final = transform.finalize(state.params, state.transform_state)
    own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jc.materialize(final))

    def norm(name):
        scale = own["params"][name]["scale"] / np.sqrt(own["batch_stats"][name]["var"] + 1e-5)
        return scale, own["params"][name]["bias"] - own["batch_stats"][name]["mean"] * scale

    (before, shift), (after, offset) = norm("first"), norm("last")
    kernel, bias = own["params"]["dense"]["kernel"], own["params"]["dense"]["bias"]
    folded = before[:, None] * kernel * after[None], (shift @ kernel + bias) * after + offset
    served = jc.execute(_student)(final, BATCH, key=None, train=False)["logits"]
    np.testing.assert_allclose(served, X @ folded[0] + folded[1], rtol=1e-4, atol=1e-4)


def test_collections_go_from_micro_batch_to_micro_batch():
    init_state, step = make_train_step(
        _student, None, optax.sgd(0.0), losses=LOSSES, mutable=["batch_stats"], micro_batches=3
    )
    state, _ = step(init_state(_variables(), key=jax.random.key(1)), None, BATCH)
    mean = np.zeros(5)
    for part in range(3):
        mean = 0.9 * mean + 0.1 * X[part::3].mean(0, dtype=np.float64)
    np.testing.assert_allclose(state.params["batch_stats"]["first"]["mean"], mean, rtol=1e-5)


@pytest.mark.parametrize(
    ("mutable", "change", "message"),
    [
        ((), dict, "returns the collection 'batch_stats', which no loss or metric reads"),
        (("cache",), dict, "`mutable` names 'cache', .* are 'batch_stats', 'params'"),
        (("batch_stats",), lambda new: {}, "The student has no 'batch_stats'"),
        (
            ("batch_stats",),
            lambda new: {"batch_stats": {"first": new["batch_stats"]["first"]}},
            "The mutable leaf 'batch_stats/last/mean' is a part of, but not returned",
        ),
        (
            ("batch_stats",),
            lambda new: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), new),
            r"returns bfloat16\[5\] for the mutable leaf 'batch_stats/first/mean', which is float32\[5\]",
        ),
    ],
)
def test_collections_that_would_be_lost_are_named(mutable, change, message):
    def student(variables, batch, *, key, train):
        outputs = _student(variables, batch, key=key, train=train)
        return {"logits": outputs.pop("logits"), **change(outputs)}

    init_state, step = make_train_step(student, None, optax.sgd(0.1), losses=LOSSES, mutable=mutable)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(step, init_state(_variables(), key=jax.random.key(1)), None, BATCH)


def test_a_collection_that_a_metric_reads_is_no_mistake():
    def mean(student, teacher, batch):
        return student["batch_stats"]["first"]["mean"].sum(), 5.0

    init_state, step = make_train_step(_student, None, optax.sgd(0.1), losses=LOSSES, metrics={"mean": mean})
    jax.eval_shape(step, init_state(_variables(), key=jax.random.key(1)), None, BATCH)
