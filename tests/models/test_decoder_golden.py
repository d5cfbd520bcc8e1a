"""Decoders against outputs of Hugging Face's PyTorch models, made by `golden/make_decoders.py`."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from golden_weights import weights
from safetensors.numpy import load_file, save_file

from jaxcompress.models import from_pretrained, save_pretrained

GOLDEN = Path(__file__).parent / "golden"
ARRAYS = dict(np.load(GOLDEN / "decoders.npz"))
MODELS = json.loads((GOLDEN / "decoders.json").read_text())


def _written(directory, model, settings):
    (directory / "config.json").write_text(json.dumps(MODELS[model][settings]))
    save_file(weights(MODELS[model]["shapes"]), directory / "model.safetensors")


@pytest.mark.parametrize("model", MODELS)
def test_outputs_are_those_of_hugging_face(model, tmp_path):
    # As transformers 5 writes a config.json, with everything in it.
    _written(tmp_path, model, "written")
    module, params = from_pretrained(tmp_path)
    run = jax.jit(lambda p, ids, mask: module.apply({"params": p}, ids, mask, output_hidden_states=True))
    ids, mask = ARRAYS["input_ids"], ARRAYS["attention_mask"]
    outputs = run(params, ids, mask)
    wanted, hidden = ARRAYS[f"{model}/outputs"], ARRAYS[f"{model}/hidden"]
    got = outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]
    where = mask > 0 if got.ndim == 3 else np.ones(3, bool)
    np.testing.assert_allclose(np.asarray(got)[where], wanted[where], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.asarray(outputs["hidden_states"][2])[mask > 0], hidden[mask > 0], atol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_what_is_written_is_what_was_read(model, assert_same_params, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    # As someone, or transformers 4, writes it: what has a default is left out.
    _written(first, model, "config")
    module, params = from_pretrained(first)
    save_pretrained(second, module, params)
    stored, back = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert set(back) == {name.removeprefix("transformer.") if "plain" in model else name for name in stored}
    again, restored = from_pretrained(second)
    assert again == module
    assert_same_params(restored, params)
