"""All the forms in which a model may lie on disk give the same parameters."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import load_file, save_file

from jaxcompress.models import BertConfig, from_pretrained

CLASSIFIER = "sequence_classification"


@pytest.fixture
def expected(golden_dir):
    return from_pretrained(golden_dir)[1]


def test_kernels_are_in_out_and_the_head_comes_from_the_config(golden_dir, expected):
    module, _ = from_pretrained(golden_dir)
    stored = load_file(golden_dir / "model.safetensors")
    assert (module.config.head, module.config.num_labels, module.config.id2label) == (
        CLASSIFIER,
        3,
        ("bad", "fair", "good"),
    )
    layer = expected["bert"]["encoder"]["layer"]["1"]
    np.testing.assert_array_equal(
        layer["intermediate"]["dense"]["kernel"], stored["bert.encoder.layer.1.intermediate.dense.weight"].T
    )
    np.testing.assert_array_equal(
        layer["attention"]["self"]["key"]["kernel"], stored["bert.encoder.layer.1.attention.self.key.weight"].T
    )


def test_names_without_prefix(model_dir, edit_weights, expected, assert_same_params):
    edit_weights(lambda tensors: {name.removeprefix("bert."): array for name, array in tensors.items()})
    assert_same_params(from_pretrained(model_dir)[1], expected)


def test_legacy_names_of_layer_norm(model_dir, edit_weights, expected, assert_same_params):
    def rename(name):
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    edit_weights(lambda tensors: {rename(name): array for name, array in tensors.items()})
    assert_same_params(from_pretrained(model_dir)[1], expected)


def test_position_ids_are_skipped(model_dir, edit_weights, expected, assert_same_params):
    edit_weights(lambda tensors: tensors | {"bert.embeddings.position_ids": np.arange(24)[None]})
    assert_same_params(from_pretrained(model_dir)[1], expected)


def test_shards(model_dir, expected, assert_same_params):
    tensors = load_file(model_dir / "model.safetensors")
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, model_dir / file)
    (model_dir / "model.safetensors").unlink()
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert_same_params(from_pretrained(model_dir)[1], expected)


@pytest.mark.parametrize("prefix", [True, False])
def test_flax_msgpack(model_dir, expected, assert_same_params, prefix):
    tree = jax.tree.map(np.asarray, expected)
    tree = tree if prefix else {**tree["bert"], "classifier": tree["classifier"]}
    (model_dir / "model.safetensors").unlink()
    (model_dir / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    assert_same_params(from_pretrained(model_dir)[1], expected)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_stored_dtype_is_kept(model_dir, edit_weights, expected, assert_same_params, dtype):
    edit_weights(lambda tensors: {name: array.astype(dtype) for name, array in tensors.items()})
    assert_same_params(from_pretrained(model_dir)[1], jax.tree.map(lambda leaf: leaf.astype(dtype), expected))


def test_tied_decoder_and_its_bias_may_be_stored_twice(model_dir, edit_weights, assert_same_params):
    expected = from_pretrained(model_dir, head="masked_lm")[1]

    def add(tensors):
        bias = tensors.pop("cls.predictions.bias")
        words = tensors["bert.embeddings.word_embeddings.weight"]
        return tensors | {"cls.predictions.decoder.weight": words, "cls.predictions.decoder.bias": bias}

    edit_weights(add)
    assert_same_params(from_pretrained(model_dir, head="masked_lm")[1], expected)


def test_mean_pooling_ignores_the_pooler(golden_dir, expected):
    module, params = from_pretrained(golden_dir, pooling="mean")
    assert module.config.pooling == "mean"
    assert set(params["bert"]) == {"embeddings", "encoder"}
    np.testing.assert_array_equal(params["classifier"]["kernel"], expected["classifier"]["kernel"])


def test_new_classifier_is_initialised_and_the_rest_is_read(model_dir, edit_weights, expected, assert_same_params):
    edit_weights(lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(("classifier", "cls"))})
    module, params = from_pretrained(model_dir, head=CLASSIFIER, num_labels=5, key=jax.random.key(0))
    assert (module.config.num_labels, module.config.id2label) == (5, ())
    assert params["classifier"]["kernel"].shape == (32, 5)
    assert 0.01 < np.std(params["classifier"]["kernel"]) < 0.03
    np.testing.assert_array_equal(params["classifier"]["bias"], 0.0)
    assert_same_params(params["bert"], expected["bert"])


def test_new_masked_language_model_head(model_dir, edit_weights):
    edit_weights(lambda tensors: {k: v for k, v in tensors.items() if not k.startswith("cls")})
    _, params = from_pretrained(model_dir, head="masked_lm", key=jax.random.key(0))
    transform = params["cls"]["predictions"]["transform"]
    np.testing.assert_array_equal(transform["LayerNorm"]["scale"], 1.0)
    np.testing.assert_array_equal(params["cls"]["predictions"]["bias"], 0.0)
    assert 0.015 < np.std(transform["dense"]["kernel"]) < 0.025


def test_new_pooler_of_a_new_classifier(model_dir, edit_weights):
    edit_weights(lambda tensors: {k: v for k, v in tensors.items() if "pooler" not in k and "classifier" not in k})
    _, params = from_pretrained(model_dir, head=CLASSIFIER, key=jax.random.key(0))
    pooler, classifier = params["bert"]["pooler"]["dense"]["kernel"], params["classifier"]["kernel"]
    assert np.abs(pooler[:, :3] - classifier).max() > 1e-3  # two keys, not one


def test_computation_dtype_leaves_parameters_alone(golden_dir, expected, assert_same_params):
    module, params = from_pretrained(golden_dir, dtype=jnp.bfloat16)
    assert module.dtype == jnp.bfloat16
    assert isinstance(module.config, BertConfig)
    assert_same_params(params, expected)
