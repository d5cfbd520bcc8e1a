"""BertConfig: what it derives and what it refuses."""

import dataclasses

import pytest

from jaxcompress.models import BertConfig

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def test_ints_are_repeated_for_every_layer():
    config = BertConfig(**SIZES)
    assert config.num_attention_heads == (4, 4)
    assert config.intermediate_size == (48, 48)
    assert config.head_size == 8


def test_lists_become_tuples_so_that_the_config_is_hashable():
    config = BertConfig(**SIZES | {"intermediate_size": [48, 0]}, extra={"pad_token_id": 0}, id2label=["no", "yes"])
    assert config.intermediate_size == (48, 0)
    assert config.id2label == ("no", "yes")
    assert hash(config) == hash(dataclasses.replace(config))


def test_extra_is_a_copy():
    extra = {"pad_token_id": 0}
    config = BertConfig(**SIZES, extra=extra)
    extra["pad_token_id"] = 1
    assert config.extra == {"pad_token_id": 0}


@pytest.mark.parametrize(
    ("head", "pooling", "has_pooler"),
    [
        ("encoder", "cls", True),
        ("encoder", "mean", False),
        ("sequence_classification", "cls", True),
        ("masked_lm", "cls", False),
    ],
)
def test_pooler_only_where_something_reads_it(head, pooling, has_pooler):
    assert BertConfig(**SIZES, head=head, pooling=pooling).has_pooler is has_pooler


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, r"`vocab_size` must be an int of at least 1, got 0"),
        ({"hidden_size": "32"}, r"`hidden_size` .* got '32'"),
        ({"num_hidden_layers": True}, r"`num_hidden_layers` .* got True"),
        ({"type_vocab_size": -1}, r"`type_vocab_size` .* got -1"),
        ({"max_position_embeddings": 1.5}, r"`max_position_embeddings` .* got 1.5"),
        ({"num_labels": 0}, r"`num_labels` .* got 0"),
        ({"num_attention_heads": (4, 4, 4)}, r"`num_attention_heads` must have one entry for each of 2 layers, got 3"),
        ({"intermediate_size": (48, -1)}, r"`intermediate_size` must be an int of at least 0, got -1"),
        ({"num_attention_heads": 5}, r"`head_size` must be given when `hidden_size` \(32\)"),
        ({"num_attention_heads": (4, 2)}, r"`head_size` must be given .* \(4, 2\)"),
        ({"num_attention_heads": 0}, r"`head_size` must be given"),
        ({"head_size": 0}, r"`head_size` must be an int of at least 1, got 0"),
        ({"hidden_dropout_prob": 1.0}, r"`hidden_dropout_prob` must be in \[0, 1\), got 1.0"),
        ({"attention_probs_dropout_prob": -0.1}, r"`attention_probs_dropout_prob` .* got -0.1"),
        ({"classifier_dropout": "high"}, r"`classifier_dropout` .* got 'high'"),
        ({"layer_norm_eps": 0}, r"`layer_norm_eps` must be a finite number above 0, got 0"),
        ({"initializer_range": None}, r"`initializer_range` must be a finite number above 0, got None"),
        ({"hidden_act": "swish"}, r"`hidden_act` must be one of 'gelu', 'gelu_new', .*'relu', 'silu', got 'swish'"),
        ({"head": "qa"}, r"`head` must be one of 'encoder', 'sequence_classification', 'masked_lm', got 'qa'"),
        ({"pooling": "max"}, r"`pooling` must be one of 'cls', 'mean', got 'max'"),
        ({"id2label": ("a", "b", "c")}, r"`id2label` must name each of `num_labels`=2 classes, got 3"),
    ],
)
def test_errors_name_the_argument_and_the_value(changes, message):
    with pytest.raises(ValueError, match=message):
        BertConfig(**SIZES | changes)
