"""Losses, deferred logits and taps on models of the library, which know nothing of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress.distillation import (
    deferred_logits,
    make_train_step,
    relations,
    soft_targets,
    tap,
)
from jaxcompress.models import LlamaConfig, make_module

COMMON = {"vocab_size": 50, "intermediate_size": 24, "max_position_embeddings": 8}
STUDENT = LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True, **COMMON)
TEACHER = LlamaConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, **COMMON)
BATCH = {
    "input_ids": jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 6))),
    "attention_mask": jnp.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
}


def _apply(config):
    module = make_module(config)

    def apply(params, batch, *, key, train):
        outputs = module.apply({"params": params}, batch["input_ids"], batch["attention_mask"], logits="none")
        tied = config.tie_word_embeddings
        head = params["model"]["embed_tokens"]["embedding"] if tied else params["lm_head"]["kernel"]
        return {"logits": deferred_logits(outputs["last_hidden_state"], head, tied=tied, block_size=16)}

    return tap(apply, {"keys": r"model/layers/\d+/self_attn/k_proj"})


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_a_student_learns_from_a_wider_and_deeper_decoder():
    rng = np.random.default_rng(1)
    modules = [make_module(config) for config in (STUDENT, TEACHER)]
    params = []
    for module in modules:
        shapes = jax.eval_shape(module.init, jax.random.key(0), BATCH["input_ids"])["params"]
        params.append(jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), shapes))
    losses = {"soft": soft_targets(temperature=2.0), "keys": relations(pairs=[(-1, -1)], heads=2, output="keys")}
    init_state, step = make_train_step(_apply(STUDENT), _apply(TEACHER), optax.sgd(0.1), losses=losses, metrics={})
    state = init_state(params[0], key=jax.random.key(2))
    state, first = step(state, params[1], BATCH)
    for _ in range(3):
        state, last = step(state, params[1], BATCH)
    assert float(last["skipped"][0]) == 0.0
    assert all(float(last[name][0]) < float(first[name][0]) for name in losses)

    @jax.jit
    def logits_in_full(*params):
        return [
            module.apply({"params": tree}, BATCH["input_ids"], BATCH["attention_mask"])["logits"] / 2.0
            for module, tree in zip(modules, params, strict=True)
        ]

    q, p = (_softmax(np.asarray(logits, np.float64)) for logits in logits_in_full(*params))
    real = np.asarray(BATCH["attention_mask"]) == 1
    assert [float(first[name][1]) for name in losses] == [real.sum(), 2 * real.sum()]
    np.testing.assert_allclose(first["soft"][0], 4.0 * (p * np.log(p / q)).sum(-1)[real].sum(), rtol=1e-4)
