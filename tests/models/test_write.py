"""What is saved can be read back, is named as PyTorch names it, and never leaves half a file."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from jaxcompress._src.models.hf import write as _hf_write
from jaxcompress._src.models.hf.shards import INDEX
from jaxcompress.models import from_pretrained, make_module, save_pretrained

HEADS = ("encoder", "sequence_classification", "masked_lm")
BELONGS = {  # first component of the golden file's names, by head
    "encoder": ("bert",),
    "sequence_classification": ("bert", "classifier"),
    "masked_lm": ("bert", "cls"),
}


@pytest.mark.parametrize("head", HEADS)
def test_names_and_values_are_those_of_the_golden_file(golden_dir, tmp_path, head):
    save_pretrained(tmp_path, *from_pretrained(golden_dir, head=head))
    golden = load_file(golden_dir / "model.safetensors")
    expected = {name: array for name, array in golden.items() if name.split(".")[0] in BELONGS[head]}
    if head == "encoder":  # transformers names the tensors of a bare BertModel without the prefix
        expected = {name.removeprefix("bert."): array for name, array in expected.items()}
    if head == "masked_lm":
        expected = {name: array for name, array in expected.items() if "pooler" not in name}
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files that do not say so


def test_settings_of_the_golden_file_survive(golden_dir, tmp_path):
    save_pretrained(tmp_path, *from_pretrained(golden_dir))
    written, golden = (json.loads((path / "config.json").read_text()) for path in (tmp_path, golden_dir))
    del golden["position_embedding_type"]  # "absolute", the only one there is
    assert written.items() >= golden.items()
    assert written["torch_dtype"] == "float32"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_uneven_round_trip(uneven_config, draw_params, assert_same_params, tmp_path, head, pooling, dtype):
    config = dataclasses.replace(uneven_config, head=head, pooling=pooling, num_labels=3)
    params = draw_params(config, dtype=dtype)
    save_pretrained(tmp_path / "new" / "directory", make_module(config), params, uneven=True)
    module, found = from_pretrained(tmp_path / "new" / "directory")
    assert module.config == config
    assert_same_params(found, params)
    settings = json.loads((tmp_path / "new" / "directory" / "config.json").read_text())
    assert settings["torch_dtype"] == jnp.dtype(dtype).name


def test_mixed_dtypes_round_trip(uneven_config, draw_params, assert_same_params, tmp_path):
    params = draw_params(uneven_config)
    params["pooler"] = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params["pooler"])
    save_pretrained(tmp_path, make_module(uneven_config), params, uneven=True)
    assert_same_params(from_pretrained(tmp_path)[1], params)


def test_files_are_as_readable_as_any_other(uneven_config, draw_params, tmp_path):
    save_pretrained(tmp_path, make_module(uneven_config), draw_params(uneven_config), uneven=True)
    (tmp_path / "other").touch()
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).stat().st_mode == (tmp_path / "other").stat().st_mode


def test_compressed_leaf_is_refused(uneven_config, draw_params, tmp_path):
    class Packed:
        def materialize(self):
            raise AssertionError("must not be called")

    params = draw_params(uneven_config)
    params["pooler"]["dense"]["kernel"] = Packed()
    with pytest.raises(ValueError, match=r"'pooler/dense/kernel' is a Packed: call `jaxcompress.materialize"):
        save_pretrained(tmp_path / "new", make_module(uneven_config), params)
    assert not (tmp_path / "new").exists()


def test_params_that_do_not_fit_are_refused(uneven_config, draw_params, tmp_path):
    params = draw_params(uneven_config)
    wrong = dataclasses.replace(uneven_config, num_attention_heads=(4, 1, 0, 1))
    with pytest.raises(
        ValueError, match=r"'encoder/layer/3/attention/self/query/kernel' has shape \(24, 16\), expected"
    ):
        save_pretrained(tmp_path, make_module(wrong), params)
    del params["pooler"]
    with pytest.raises(ValueError, match=r"missing .*'pooler/dense/kernel', 'pooler/dense/bias'"):
        save_pretrained(tmp_path, make_module(uneven_config), params, uneven=True)


def test_integer_leaf_is_refused(uneven_config, draw_params, tmp_path):
    params = draw_params(uneven_config)
    params["pooler"]["dense"]["bias"] = jnp.zeros(24, jnp.int8)
    with pytest.raises(ValueError, match=r"'pooler/dense/bias' is int8; only float32, float16 and bfloat16"):
        save_pretrained(tmp_path, make_module(uneven_config), params, uneven=True)


@pytest.mark.parametrize("broken", ["weights", "sync"])
def test_failure_leaves_the_old_files_alone(uneven_config, draw_params, tmp_path, monkeypatch, broken):
    module = make_module(uneven_config)
    save_pretrained(tmp_path, module, draw_params(uneven_config), uneven=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def half(tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(_hf_write, *(("save_file", half) if broken == "weights" else ("_sync", fail)))
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(tmp_path, module, draw_params(uneven_config, seed=1), uneven=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_replaces_an_older_model(uneven_config, draw_params, assert_same_params, tmp_path):
    module = make_module(uneven_config)
    (tmp_path / "vocab.txt").write_text("kept")
    for seed in (0, 1):
        params = draw_params(uneven_config, seed=seed)
        save_pretrained(tmp_path, module, params, uneven=True)
    assert_same_params(from_pretrained(tmp_path)[1], params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "vocab.txt"]


def _weights(directory):
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("model"))


def test_shards_are_those_of_transformers(uneven_config, draw_params, assert_same_params, tmp_path):
    module, params = make_module(uneven_config), draw_params(uneven_config)
    save_pretrained(tmp_path / "one", module, params, uneven=True)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    limit = max(array.nbytes for array in whole.values()) - 1
    save_pretrained(tmp_path / "many", module, params, uneven=True, max_shard_size=limit)
    files = _weights(tmp_path / "many")
    count = len(files) - 1
    assert count > 2
    assert files == [*(f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)), INDEX]
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(array.nbytes for array in whole.values())}
    shards = {file: load_file(tmp_path / "many" / file) for file in files[:-1]}
    assert index["weight_map"] == {name: file for file, shard in shards.items() for name in shard}
    sizes = [sum(array.nbytes for array in shard.values()) for shard in shards.values()]
    # Only what is larger has a file of its own, and no two neighbours would have gone into one.
    assert all(size <= limit or len(shard) == 1 for size, shard in zip(sizes, shards.values(), strict=True))
    assert all(sum(pair) > limit for pair in itertools.pairwise(sizes))
    for file in shards:
        assert (tmp_path / "many" / file).stat().st_mode == (tmp_path / "many" / INDEX).stat().st_mode
        with safe_open(tmp_path / "many" / file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert_same_params(from_pretrained(tmp_path / "many")[1], params)


@pytest.mark.parametrize(("before", "after"), [("5GB", "2KB"), ("2KB", "5GB"), ("2KB", "3KB"), ("2KB", "2KB")])
def test_weights_of_an_older_model_are_not_read(
    uneven_config, draw_params, assert_same_params, tmp_path, before, after
):
    module, params = make_module(uneven_config), draw_params(uneven_config, seed=1)
    save_pretrained(tmp_path / "new", module, params, uneven=True, max_shard_size=after)
    save_pretrained(tmp_path / "old", module, draw_params(uneven_config), uneven=True, max_shard_size=before)
    save_pretrained(tmp_path / "old", module, params, uneven=True, max_shard_size=after)
    assert _weights(tmp_path / "old") == _weights(tmp_path / "new")
    assert_same_params(from_pretrained(tmp_path / "old")[1], params)


def test_a_failure_between_shards_leaves_no_mixture(uneven_config, draw_params, tmp_path, monkeypatch):
    module, moved = make_module(uneven_config), []
    save_pretrained(tmp_path, module, draw_params(uneven_config), uneven=True, max_shard_size="2KB")

    def replace(source, target):
        if len(moved) == 2:
            raise OSError("disk full")
        moved.append(target)
        source.rename(target)

    monkeypatch.setattr(_hf_write.os, "replace", replace)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(tmp_path, module, draw_params(uneven_config, seed=1), uneven=True, max_shard_size="2KB")
    with pytest.raises(FileNotFoundError, match="There are no weights"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [0, -1, "5", "5 lightyears", "GB", "0KB", 1.5])
def test_a_shard_size_that_is_none(uneven_config, draw_params, tmp_path, size):
    with pytest.raises(Exception, match="max_shard_size"):
        save_pretrained(
            tmp_path / "new", make_module(uneven_config), draw_params(uneven_config), uneven=True, max_shard_size=size
        )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {},
            "numbers of heads differ: 4 in layer 0, 1 in layer 1, 0 in layer 2, 2 in layer 3; FFN widths differ: 40",
        ),
        ({"num_attention_heads": 3}, "cannot load this shape: FFN widths differ: 40 in layer 0, 8 in layer 1"),
        ({"intermediate_size": 9}, r"numbers of heads differ: .* 2 in layer 3\. Save it with `uneven=True`"),
        ({"num_attention_heads": 2, "intermediate_size": 9}, "2 heads of 8 make up 16, not `hidden_size`, 24"),
        ({"num_attention_heads": 3, "intermediate_size": 0}, "no layer has FFN columns"),
    ],
)
def test_shape_that_transformers_cannot_load_needs_a_word(uneven_config, draw_params, tmp_path, sizes, message):
    config = dataclasses.replace(uneven_config, **sizes)
    with pytest.raises(ValueError, match=message):
        save_pretrained(tmp_path / "new", make_module(config), draw_params(config))
    assert not (tmp_path / "new").exists()
    save_pretrained(tmp_path / "new", make_module(config), draw_params(config), uneven=True)
    assert from_pretrained(tmp_path / "new")[0].config == config


def test_even_shape_needs_no_word(uneven_config, draw_params, tmp_path):
    config = dataclasses.replace(uneven_config, num_attention_heads=3, intermediate_size=9)
    save_pretrained(tmp_path, make_module(config), draw_params(config))
    settings = json.loads((tmp_path / "config.json").read_text())
    assert (settings["num_attention_heads"], settings["intermediate_size"]) == (3, 9)
    assert "jaxcompress" not in settings
