"""Matmuls over one axis of rows: what is seen of a model from outside has all of its axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.calibration import input_statistics
from jaxcompress.distillation import relations, tap
from jaxcompress.models import BertConfig, GPT2Config, LlamaConfig, make_module
from jaxcompress.tree import by_path

SIZES = {
    "vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 6,
    "max_position_embeddings": 8,
}  # fmt: skip
CONFIGS = {
    "bert": BertConfig(**SIZES, head="masked_lm"),
    "distilbert": BertConfig(**SIZES, model_type="distilbert", head="masked_lm"),
    "gpt2": GPT2Config(**SIZES, head="causal_lm"),
    "gpt2, untied": GPT2Config(**SIZES, head="causal_lm", tie_word_embeddings=False),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=1, head="causal_lm"),
    "llama, tied": LlamaConfig(**SIZES, num_key_value_heads=1, head="causal_lm", tie_word_embeddings=True),
}
IDS = np.array([[3, 1, 4], [1, 5, 0]], np.int32)
MASK = np.array([[1, 1, 1], [1, 1, 0]], np.int32)


def _model(config):
    module = make_module(config)
    params = jax.eval_shape(module.init, jax.random.key(0), IDS)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)
    return params, lambda p, batch, **_: module.apply({"params": p}, batch["input_ids"])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_modules_return_has_all_leading_axes(config):
    params, apply = _model(config)
    tensors = jax.eval_shape(tap(apply, ".*"), params, {"input_ids": IDS})
    dense = {name: leaf.shape for name, leaf in tensors.items() if hasattr(leaf, "shape") and leaf.ndim < 4}
    leading = {shape[:2] for name, shape in dense.items() if "position" not in name and "wpe" not in name}
    assert len(dense) > 20
    assert leading == {IDS.shape}


def test_relations_of_values_that_are_tapped():
    """As they are read in MiniLM's loss: rows of a batch must not attend to one another."""
    params, apply = _model(CONFIGS["bert"])
    batch = {"input_ids": IDS, "attention_mask": MASK}
    outputs = tap(apply, {"values": ".*/value"})(params, batch)
    other = jax.tree.map(lambda value: value[:, ::-1], outputs["values"])
    loss = relations(pairs=[(0, 0), (1, 1)], heads=2, output="values")
    _, count = loss(outputs, {"values": other}, batch)
    # Of each layer and each head, one distribution for each token.
    assert float(count) == 2 * 2 * MASK.sum()


@pytest.mark.parametrize(("name", "leaves"), [("bert", "query|key|value"), ("llama", "q_proj|k_proj|v_proj")])
def test_leaves_that_read_the_same_rows_share_their_statistics(name, leaves):
    params, apply = _model(CONFIGS[name])
    select = by_path(f".*/0/.*/({leaves})/kernel")
    found = input_statistics(apply, params, [({"input_ids": IDS},)], select=select)
    grams = jax.tree.leaves(jax.tree.map(lambda each: each.gram, found, is_leaf=lambda x: hasattr(x, "gram")))
    assert len(grams) == 3
    assert all(gram is grams[0] for gram in grams)
