"""The loop of recipes: what it tells of its progress, and a loss that is NaN."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_bert import small_classifier

from jaxcompress._src.recipe.train import _Skips
from jaxcompress.recipe import Tokens, Training, train


class Noted:
    """Progress that is written down."""

    def __init__(self):
        self.losses = []

    @contextlib.contextmanager
    def task(self, name, total):
        self.losses.append((name, total))
        yield self

    def advance(self, **figures):
        self.losses.append(figures["loss"])

    def note(self, text):
        raise AssertionError(text)


def test_every_step_tells_its_loss_and_nan_names_its_step():
    module = small_classifier(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    params = jax.jit(module.init)(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    ids = tuple(tuple(map(int, rng.integers(5, 40, 6))) for _ in range(8))
    tokens = Tokens(ids=ids, labels=rng.integers(0, 2, 8).astype(np.int32), pad_id=0)
    training = Training(epochs=2, batch_size=4, learning_rate=1e-3, hard_labels=1.0)
    noted = Noted()
    trained, _ = train(module, params, tokens, training, progress=noted, name="Fine-tuning")
    head, *losses = noted.losses
    assert head == ("Fine-tuning", 4)
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    assert len(set(losses)) == 4
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (params, trained)), strict=True))
    poisoned = jax.tree.map(lambda leaf: leaf * np.nan, params)
    with pytest.raises(ValueError, match=r"Fine-tuning: the loss became NaN or Inf at step 1; lower `learning_rate`"):
        train(module, poisoned, tokens, training, name="Fine-tuning")


@pytest.fixture(scope="module")
def small():
    """A classifier, its params, and rows."""
    module = small_classifier(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    params = jax.jit(module.init)(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    ids = tuple(tuple(map(int, rng.integers(5, 40, 6))) for _ in range(8))
    return module, params, Tokens(ids=ids, labels=rng.integers(0, 2, 8).astype(np.int32), pad_id=0)


def _trained(small, **options):
    module, params, tokens = small
    options = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "hard_labels": 1.0, "warmup": 0.0} | options
    return train(module, params, tokens, Training(**options))[0]


def _largest_gap(one, two):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return max(float(jnp.abs(jnp.float32(x) - jnp.float32(y)).max()) for x, y in pairs)


@pytest.fixture(scope="module")
def plain(small):
    """What four steps give without any of the options."""
    return _trained(small)


def test_options_that_change_no_result(small, plain):
    every = _trained(small, micro_batches=2, loss_scale=1024.0, dynamic_loss_scale=True, remat="nothing_saveable")
    assert _largest_gap(plain, every) < 1e-4 < 1e-3 < _largest_gap(plain, small[1])


def test_averages_are_the_result(small, plain):
    # Nearly the mean of the four steps: on the way.
    averages = _trained(small, ema=0.99)
    assert 1e-4 < _largest_gap(averages, plain) < _largest_gap(plain, small[1])


def test_masters_of_weights_that_are_wide_already(small):
    with pytest.raises(ValueError, match=r"`float32_masters` has nothing to do: .* the trained leaves are float32"):
        _trained(small, float32_masters=True)


def test_rows_without_a_token(small):
    """Nothing would be learnt, at a loss of 0."""
    module, params, tokens = small
    tokens = dataclasses.replace(tokens, ids=((),) * 8)
    with pytest.raises(ValueError, match="None of the 8 rows to train on has a token: their texts are empty"):
        train(module, params, tokens, Training(epochs=1, batch_size=4, learning_rate=1e-3, hard_labels=1.0))


@pytest.mark.parametrize("rows", [7, 9])
def test_outputs_of_a_teacher_on_other_rows(small, rows):
    training = Training(epochs=1, batch_size=4, learning_rate=1e-3, soft_targets=1.0)
    with pytest.raises(ValueError, match=f"`cached` has 'logits' of {rows} rows, and there are 8 to train on"):
        train(*small, training, cached={"logits": np.zeros((rows, 2), np.float32)})


def test_a_dynamic_loss_scale_that_does_not_help():
    skips = _Skips(Training(epochs=1, learning_rate=1.0, pooled=1.0, dynamic_loss_scale=True, loss_scale=4.0))
    for step in (1, 2, 3, 4):
        skips(step, {"skipped": 1.0})
    with pytest.raises(FloatingPointError, match="was NaN or Inf in every step"):
        skips.check_any_step_was_taken()
    with pytest.raises(FloatingPointError, match="NaN or Inf at any loss scale, at step 5"):
        skips(5, {"skipped": 1.0})
    skips(6, {"skipped": 0.0})
    skips(7, {"skipped": 1.0})
    skips.check_any_step_was_taken()
