"""A model with fewer heads and columns equals the whole model with those masked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxcompress._src.models.bert.shapes import config_from_params
from jaxcompress.models import BertConfig, make_module

IDS = np.array([[3, 9, 4, 7, 1], [8, 2, 6, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
HEADS = ((0, 1, 2, 3), (2,), (), (0, 3))  # kept, by layer
COLUMNS = ((0, 5, 39), tuple(range(40)), (7,), ())


@pytest.fixture
def whole():
    return BertConfig(
        vocab_size=30,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=8,
        head="sequence_classification",
    )


def _parts(params, config):
    """The same model twice: the rows of removed heads and columns set to zero, and these cut out."""
    masked = {path: np.array(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    cut = dict(masked)
    for layer, (heads, columns) in enumerate(zip(HEADS, COLUMNS, strict=True)):
        path = f"bert/encoder/layer/{layer}"
        rows = [head * config.head_size + i for head in heads for i in range(config.head_size)]
        for name in ("query", "key", "value"):
            cut[f"{path}/attention/self/{name}/kernel"] = cut[f"{path}/attention/self/{name}/kernel"][:, rows]
            cut[f"{path}/attention/self/{name}/bias"] = cut[f"{path}/attention/self/{name}/bias"][rows]
        cut[f"{path}/intermediate/dense/kernel"] = cut[f"{path}/intermediate/dense/kernel"][:, list(columns)]
        cut[f"{path}/intermediate/dense/bias"] = cut[f"{path}/intermediate/dense/bias"][list(columns)]
        for name, kept in ((f"{path}/attention/output/dense/kernel", rows), (f"{path}/output/dense/kernel", columns)):
            cut[name] = cut[name][list(kept)]
            masked[name][np.setdiff1d(np.arange(len(masked[name])), kept).astype(int)] = 0
    return tuple(unflatten_dict(jax.tree.map(jnp.asarray, leaves), sep="/") for leaves in (masked, cut))


def test_cut_model_equals_the_masked_model(whole, draw_params):
    masked, cut = _parts(draw_params(whole), whole)
    config = config_from_params(cut, whole)
    assert config.num_attention_heads == (4, 1, 0, 2)
    assert config.intermediate_size == (3, 40, 1, 0)
    expected = make_module(whole).apply({"params": masked}, IDS, MASK, output_hidden_states=True)
    found = make_module(config).apply({"params": cut}, IDS, MASK, output_hidden_states=True)
    np.testing.assert_allclose(found["logits"], expected["logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.stack(found["hidden_states"]), np.stack(expected["hidden_states"]), rtol=0, atol=1e-5)


def test_layer_without_heads_and_columns_is_bias_residual_and_norm(draw_params, run):
    config = BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=0, intermediate_size=0, head_size=4
    )
    params = draw_params(config)
    before, after = run(config, params, IDS, MASK, output_hidden_states=True)["hidden_states"]
    layer = jax.tree.map(np.float64, params["encoder"]["layer"]["0"])
    for sublayer in (layer["attention"]["output"], layer["output"]):
        x = np.float64(before) + sublayer["dense"]["bias"]
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        before = x * sublayer["LayerNorm"]["scale"] + sublayer["LayerNorm"]["bias"]
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)


def test_fresh_module_without_heads_and_columns_can_be_initialised(uneven_config):
    params = jax.jit(make_module(uneven_config).init)(jax.random.key(0), IDS)["params"]
    layers = params["encoder"]["layer"]
    assert layers["2"]["attention"]["output"]["dense"]["kernel"].shape == (0, 24)
    assert layers["3"]["output"]["dense"]["kernel"].shape == (0, 24)
    assert np.std(layers["0"]["output"]["dense"]["kernel"]) == pytest.approx(0.02, rel=0.1)
    assert config_from_params(params, dataclasses.replace(uneven_config, num_attention_heads=4)) == uneven_config
