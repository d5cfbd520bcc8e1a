"""The loop of recipes: what it tells of its progress, and a loss that is NaN."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_bert import small_classifier

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
