"""Sizes are recovered from shapes, whatever carries them."""

import dataclasses

import jax
import pytest
from flax.core import freeze
from flax.traverse_util import unflatten_dict

from jaxcompress._src.models.bert.parameters import parameter_shapes
from jaxcompress._src.models.bert.shapes import config_from_params


@dataclasses.dataclass
class _Shaped:
    shape: tuple


@pytest.mark.parametrize("head", ["encoder", "sequence_classification", "masked_lm"])
@pytest.mark.parametrize("leaf", [_Shaped, lambda shape: jax.ShapeDtypeStruct(shape, "float32")])
def test_recovers_layers_heads_and_widths(uneven_config, head, leaf):
    config = dataclasses.replace(uneven_config, head=head)
    params = unflatten_dict({path: leaf(shape) for path, shape in parameter_shapes(config).items()}, sep="/")
    other = dataclasses.replace(config, num_hidden_layers=6, num_attention_heads=3, intermediate_size=9)
    assert config_from_params(params, other) == config
    assert config_from_params(freeze(params), other) == config


def _tree(config, **changes):
    shapes = parameter_shapes(config) | changes
    return unflatten_dict({path: _Shaped(shape) for path, shape in shapes.items() if shape is not None}, sep="/")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"encoder/layer/0/attention/self/key/kernel": (24, 24)},
            r"'encoder/layer/0/attention/self/key/kernel' has shape \(24, 24\), expected \(24, 32\)",
        ),
        (
            {"encoder/layer/1/output/dense/kernel": (9, 24)},
            r"'encoder/layer/1/output/dense/kernel' has shape \(9, 24\), expected \(8, 24\)",
        ),
        (
            {"encoder/layer/0/attention/self/query/kernel": (24, 12)},
            r"'encoder/layer/0/attention/self/query/kernel' has 12 outputs, expected a multiple of `head_size`, 8",
        ),
        (
            {"encoder/layer/0/attention/self/query/kernel": (24, 4, 8)},
            r"'encoder/layer/0/attention/self/query/kernel' has shape \(24, 4, 8\), expected \(inputs, outputs\)",
        ),
        (
            {"embeddings/word_embeddings/embedding": (31, 24)},
            r"'embeddings/word_embeddings/embedding' has shape \(31, 24\), expected \(30, 24\)",
        ),
        (
            {"encoder/layer/3/intermediate/dense/kernel": None},
            r"'encoder/layer/3/intermediate/dense/kernel' is missing",
        ),
        ({"pooler/dense/bias": None}, r"missing from the params of a 'encoder' BERT: 'pooler/dense/bias'"),
        ({"classifier/kernel": (24, 2)}, r"do not belong to the params of a 'encoder' BERT: 'classifier/kernel'"),
        ({"encoder/layer/7/output/dense/bias": (24,)}, r"without gaps, found \[0, 1, 2, 3, 7\]"),
    ],
)
def test_leaf_that_disagrees_is_named(uneven_config, changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_params(_tree(uneven_config, **changes), uneven_config)


def test_tree_of_another_head_is_refused(uneven_config):
    tree = _tree(dataclasses.replace(uneven_config, head="masked_lm"))
    with pytest.raises(ValueError, match=r"layers under 'encoder/layer' .* found \[\]"):
        config_from_params(tree, uneven_config)
