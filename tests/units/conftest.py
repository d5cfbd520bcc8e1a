"""A small BERT whose layers differ, random parameters, and what a compiled run of it gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from jaxcompress._src.models.bert.parameters import parameter_shapes
from jaxcompress.models import BertConfig, make_module

IDS = np.array([[3, 9, 4, 7, 1], [8, 2, 6, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.fixture(scope="session")
def config():
    """Nothing is square: 3 and 2 heads of 5, columns 7 and 11, hidden size 12."""
    return BertConfig(
        vocab_size=30,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=(3, 2),
        intermediate_size=(7, 11),
        head_size=5,
        max_position_embeddings=8,
        head="sequence_classification",
        num_labels=3,
    )


@pytest.fixture(scope="session")
def draw():
    """Random parameters of a config."""

    def drawn(config):
        rng = np.random.default_rng(0)
        leaves = {
            path: jnp.asarray(path.endswith("/scale") + 0.5 * rng.standard_normal(shape), jnp.float32)
            for path, shape in parameter_shapes(config).items()
        }
        return unflatten_dict(leaves, sep="/")

    return drawn


@pytest.fixture(scope="session")
def params(draw, config):
    return draw(config)


@functools.cache
def compiled(module):
    return jax.jit(lambda params: module.apply({"params": params}, IDS, MASK, output_hidden_states=True))


@pytest.fixture(scope="session")
def run():
    """Logits and all hidden states of a module, as one vector."""

    def outputs(module, params):
        found = compiled(module)(params)
        return np.concatenate([np.ravel(found["logits"]), *map(np.ravel, found["hidden_states"])])

    return outputs


@pytest.fixture(scope="session")
def module(config):
    return make_module(config)
