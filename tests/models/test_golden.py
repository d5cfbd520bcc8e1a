"""Outputs and parameter paths equal those of Hugging Face.

BERT by its Flax classes (golden/make_tiny_bert.py), RoBERTa and DistilBERT by its Flax and its PyTorch classes
(golden/make_tiny_encoders.py).
"""

import dataclasses
import json

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxcompress.models import from_pretrained, make_module

HEADS = ("encoder", "sequence_classification", "masked_lm")
VARIANTS = ("roberta", "distilbert")


@pytest.mark.parametrize("head", HEADS)
def test_parameter_paths(golden, golden_dir, head):
    _, params = from_pretrained(golden_dir, head=head)
    assert sorted(flatten_dict(params, sep="/")) == json.loads(str(golden["paths"]))[head]


@pytest.mark.parametrize(
    ("head", "name"),
    [
        ("encoder", "last_hidden_state"),
        ("encoder", "pooler_output"),
        ("encoder", "hidden_states"),
        ("encoder", "attentions"),
        ("sequence_classification", "logits"),
        ("masked_lm", "logits"),
    ],
)
def test_outputs(golden, golden_dir, inputs, head, name):
    module, params = from_pretrained(golden_dir, head=head)
    outputs = module.apply({"params": params}, **inputs, output_hidden_states=True, output_attentions=True)
    found = np.stack(outputs[name]) if isinstance(outputs[name], tuple) else np.asarray(outputs[name])
    np.testing.assert_allclose(found, golden[f"{head}/{name}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_by_flax_and_by_pytorch(variant_golden, variant, head):
    directory, by_flax, by_torch = variant_golden(variant)
    module, params = from_pretrained(directory, head=head)
    assert sorted(flatten_dict(params, sep="/")) == json.loads(str(by_flax["paths"]))[head]
    ids, mask = by_flax["input/input_ids"], by_flax["input/attention_mask"]
    outputs = module.apply({"params": params}, ids, mask, output_hidden_states=True, output_attentions=True)
    expected = [name for name in by_torch if name.startswith(f"{head}/")]
    assert set(expected) <= set(by_flax)
    assert ("encoder/hidden_states" in expected) == (head == "encoder")
    for name in expected:
        output = outputs[name.split("/")[1]]
        found = np.stack(output) if isinstance(output, tuple) else np.asarray(output)
        for golden in (by_flax, by_torch):
            np.testing.assert_allclose(found, golden[name], rtol=0, atol=1e-5, err_msg=name)


def test_xlm_roberta_is_a_roberta(variant_golden):
    directory, _, by_torch = variant_golden("roberta")
    module, params = from_pretrained(directory)
    module = make_module(dataclasses.replace(module.config, model_type="xlm-roberta"))
    outputs = module.apply({"params": params}, by_torch["input/input_ids"], by_torch["input/attention_mask"])
    expected = by_torch["sequence_classification/logits"]
    np.testing.assert_allclose(outputs["logits"], expected, rtol=0, atol=1e-5)
