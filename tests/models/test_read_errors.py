"""Everything that can be wrong with a directory is said in one clear line."""

import json
import pickle

import jax
import numpy as np
import pytest
from flax import serialization

from jaxcompress.models import from_pretrained

QUERY = "bert.encoder.layer.1.attention.self.query.weight"


def _rename_weights(model_dir, name):
    (model_dir / "model.safetensors").rename(model_dir / name)


def test_no_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no directory .*nowhere"):
        from_pretrained(tmp_path / "nowhere")


def test_no_config(model_dir):
    (model_dir / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config.json in '.*model'"):
        from_pretrained(model_dir)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", r"is not JSON"), ("[" * 10**5, r"is not JSON"), ("[]", r"must hold a JSON object, found list")],
)
def test_config_that_is_not_an_object(model_dir, text, message):
    (model_dir / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config.json' {message}"):
        from_pretrained(model_dir)


def test_other_model_type(model_dir, edit_config):
    edit_config(model_type="mamba")
    with pytest.raises(ValueError, match=r"config.json': `model_type` is 'mamba'; supported: 'bert', .*'gpt2'"):
        from_pretrained(model_dir)


def test_unknown_head(model_dir):
    with pytest.raises(ValueError, match=r"`head` must be one of .*, got 'qa'"):
        from_pretrained(model_dir, head="qa")


def test_no_weights(model_dir):
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no weights in .*: expected model.safetensors, .* or flax_model.msgpack"
    ):
        from_pretrained(model_dir)


def test_pickle_is_never_loaded(model_dir, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (model_dir / "model.safetensors").unlink()
    (model_dir / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(FileNotFoundError, match=r"has pytorch_model.bin, .* never loaded, .* convert them"):
        from_pretrained(model_dir)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
def test_truncated_safetensors(model_dir, keep):
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors' is damaged or not a safetensors file"):
        from_pretrained(model_dir)


def test_garbage_safetensors(model_dir):
    (model_dir / "model.safetensors").write_bytes(b"\xff" * 500)
    with pytest.raises(ValueError, match=r"model.safetensors' is damaged"):
        from_pretrained(model_dir)


@pytest.mark.parametrize("content", [b"", b"\xc1garbage", b"\x93\x01\x02\x03"])
def test_damaged_msgpack(model_dir, content):
    (model_dir / "model.safetensors").unlink()
    (model_dir / "flax_model.msgpack").write_bytes(content)
    with pytest.raises(ValueError, match=r"flax_model.msgpack' is damaged or not a Flax msgpack file"):
        from_pretrained(model_dir)


def test_msgpack_with_something_else_than_arrays(model_dir):
    (model_dir / "model.safetensors").unlink()
    (model_dir / "flax_model.msgpack").write_bytes(b"\x81\xa1a\x01")
    with pytest.raises(ValueError, match=r"'a' in .*flax_model.msgpack' is int, expected an array"):
        from_pretrained(model_dir)


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": 3}'])
def test_damaged_index(model_dir, index):
    _rename_weights(model_dir, "shard.safetensors")
    (model_dir / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"index.json' is not an index of shards"):
        from_pretrained(model_dir)


@pytest.mark.parametrize(
    ("shard", "error", "message"),
    [
        ("gone.safetensors", FileNotFoundError, r"Shard 'gone.safetensors', named in .* is not in"),
        ("../shard.safetensors", ValueError, r"'../shard.safetensors', which is not a plain file name"),
        ("shard.safetensors", ValueError, r"Tensor 'nothing' is not in shard 'shard.safetensors'"),
    ],
)
def test_index_that_does_not_fit_the_shards(model_dir, shard, error, message):
    _rename_weights(model_dir, "shard.safetensors")
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"nothing": shard}}))
    with pytest.raises(error, match=message):
        from_pretrained(model_dir)


def test_unknown_tensors_are_listed(model_dir, edit_weights):
    edit_weights(lambda tensors: tensors | {"adapter.down.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(ValueError, match=r"model' do not fit: unknown tensors: 'adapter.down.weight'"):
        from_pretrained(model_dir)


def test_missing_tensors_are_listed(model_dir, edit_weights):
    edit_weights(lambda tensors: {k: v for k, v in tensors.items() if k != QUERY})
    for head in (None, "encoder"):  # asking for a head does not excuse a hole in the encoder
        with pytest.raises(ValueError, match=rf"missing tensors: '.*{QUERY.removeprefix('bert.')}'"):
            from_pretrained(model_dir, head=head)


def test_missing_head_that_was_not_asked_for(model_dir, edit_weights):
    edit_weights(lambda tensors: {k: v for k, v in tensors.items() if not k.startswith("classifier")})
    with pytest.raises(ValueError, match=r"missing tensors: 'classifier.weight', 'classifier.bias'. Give `head=`"):
        from_pretrained(model_dir)


def test_new_head_without_a_key(model_dir, edit_weights):
    edit_weights(lambda tensors: {k: v for k, v in tensors.items() if not k.startswith("classifier")})
    with pytest.raises(ValueError, match=r"'classifier.weight' is new; give `key=`"):
        from_pretrained(model_dir, head="sequence_classification")


def test_head_that_is_there_in_part_is_damaged_not_new(model_dir, edit_weights):
    edit_weights(lambda tensors: {k: v for k, v in tensors.items() if k != "classifier.bias"})
    with pytest.raises(ValueError, match=r"missing tensors: 'classifier.bias'"):
        from_pretrained(model_dir, head="sequence_classification")


def test_untied_decoder(model_dir, edit_weights):
    edit_weights(lambda tensors: tensors | {"cls.predictions.decoder.weight": np.zeros((60, 32), np.float32)})
    with pytest.raises(ValueError, match=r"'cls.predictions.decoder.weight' differs from 'bert.embeddings.word_emb"):
        from_pretrained(model_dir, head="masked_lm")


def test_two_names_for_one_parameter(model_dir, edit_weights):
    edit_weights(lambda tensors: tensors | {"pooler.dense.bias": np.zeros(32, np.float32)})
    with pytest.raises(ValueError, match=r"'bert.pooler.dense.bias' and 'pooler.dense.bias'|same parameter"):
        from_pretrained(model_dir)


def test_integer_tensor(model_dir, edit_weights):
    edit_weights(lambda tensors: tensors | {QUERY: tensors[QUERY].astype(np.int8)})
    with pytest.raises(ValueError, match=rf"Tensor '{QUERY}' is int8; supported: float32, float16, bfloat16"):
        from_pretrained(model_dir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 61}, r"'bert.embeddings.word_embeddings.weight' has shape \(60, 32\), expected \(61, 32\)"),
        (
            {"max_position_embeddings": 8},
            r"'bert.embeddings.position_embeddings.weight' has shape \(24, 32\), expected",
        ),
        ({"hidden_size": 64}, r"'bert.embeddings.word_embeddings.weight' has shape \(60, 32\), expected \(60, 64\)"),
        (
            {"intermediate_size": 64},
            r"'bert.encoder.layer.0.intermediate.dense.weight' has shape \(48, 32\), .*\(64, 32\)",
        ),
        ({"num_hidden_layers": 2}, r"'bert.encoder.layer.2.* there are 3 layers; expected 2, by `num_hidden_layers`"),
        ({"num_hidden_layers": 4}, r"'bert.encoder.layer.2.* there are 3 layers; expected 4"),
        ({"jaxcompress": {"head_size": 4}}, r"'bert.encoder.layer.0.attention.self.query.weight' has .*\(16, 32\)"),
        ({"id2label": {"0": "a"}}, r"'classifier.weight' has shape \(3, 32\), expected \(1, 32\)"),
    ],
)
def test_config_that_disagrees_with_the_weights(model_dir, edit_config, changes, message):
    edit_config(**changes)
    with pytest.raises(ValueError, match=message):
        from_pretrained(model_dir)


def test_shape_in_msgpack_is_shown_as_it_is_stored(model_dir, edit_config):
    _, params = from_pretrained(model_dir)
    (model_dir / "model.safetensors").unlink()
    content = serialization.msgpack_serialize(jax.tree.map(np.asarray, params))
    (model_dir / "flax_model.msgpack").write_bytes(content)
    edit_config(intermediate_size=64)
    with pytest.raises(
        ValueError, match=r"layer/0/intermediate/dense/kernel' has shape \(32, 48\), expected \(32, 64\)"
    ):
        from_pretrained(model_dir)
