"""Outputs and parameter paths equal those of Hugging Face's Flax BERT (see golden/make_tiny_bert.py)."""

import json

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxcompress.models import from_pretrained

HEADS = ("encoder", "sequence_classification", "masked_lm")


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
