"""BertConfig to and from `config.json`."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress._src.models.hf.config import config_from_huggingface, config_to_huggingface, read_config
from jaxcompress.models import BertConfig

SETTINGS = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
COUNTS = st.lists(st.integers(0, 5), min_size=3, max_size=3).map(tuple)


@given(
    heads=COUNTS,
    widths=COUNTS,
    head_size=st.integers(1, 9),
    head=st.sampled_from(["encoder", "sequence_classification", "masked_lm"]),
    pooling=st.sampled_from(["cls", "mean"]),
    num_labels=st.integers(1, 4),
    named=st.booleans(),
)
def test_round_trip_through_json(heads, widths, head_size, head, pooling, num_labels, named):
    config = BertConfig(
        vocab_size=60,
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=heads,
        intermediate_size=widths,
        head_size=head_size,
        hidden_act="relu",
        classifier_dropout=0.25,
        head=head,
        num_labels=num_labels,
        pooling=pooling,
        id2label=tuple("abcd"[:num_labels]) if named else (),
        extra={"pad_token_id": 0, "nested": {"a": [1, None]}},
    )
    assert config_from_huggingface(json.loads(json.dumps(config_to_huggingface(config)))) == config


def test_even_config_has_no_key_of_ours():
    settings = config_to_huggingface(config_from_huggingface(SETTINGS))
    assert "jaxcompress" not in settings
    assert settings["num_attention_heads"] == 4
    assert settings["intermediate_size"] == 48


def test_uneven_config_says_so_under_the_documented_keys():
    config = config_from_huggingface(
        SETTINGS | {"jaxcompress": {"num_attention_heads": [4, 1], "head_size": 8, "pooling": "mean"}}
    )
    assert (config.num_attention_heads, config.head_size, config.pooling) == ((4, 1), 8, "mean")
    assert config_to_huggingface(config)["jaxcompress"] == {
        "num_attention_heads": [4, 1],
        "head_size": 8,
        "pooling": "mean",
    }


def test_unknown_settings_survive():
    settings = SETTINGS | {"pad_token_id": 0, "problem_type": "regression", "transformers_version": "4.8.2"}
    written = config_to_huggingface(config_from_huggingface(settings))
    assert written.items() >= settings.items()


def test_pruned_heads_of_transformers_4_lower_the_head_counts():
    config = config_from_huggingface(SETTINGS | {"pruned_heads": {"1": [0, 3]}})
    assert config.num_attention_heads == (4, 2)
    assert config.head_size == 8


def test_labels_give_num_labels_and_go_back():
    labels = {"0": "bad", "1": "fair", "2": "good"}
    settings = SETTINGS | {"architectures": ["BertForSequenceClassification"], "id2label": labels}
    config = config_from_huggingface(settings)
    assert (config.num_labels, config.id2label) == (3, ("bad", "fair", "good"))
    written = config_to_huggingface(config)
    assert written["id2label"] == labels
    assert written["label2id"] == {"bad": 0, "fair": 1, "good": 2}


def test_classifier_without_names_tells_transformers_how_many_labels():
    settings = SETTINGS | {"architectures": ["BertForSequenceClassification"], "num_labels": 3}
    written = config_to_huggingface(config_from_huggingface(settings))
    assert written["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}


@pytest.mark.parametrize(
    ("architecture", "head"),
    [
        ("BertModel", "encoder"),
        ("BertForSequenceClassification", "sequence_classification"),
        ("BertForMaskedLM", "masked_lm"),
        ("BertForPreTraining", "masked_lm"),
    ],
)
def test_head_by_architecture(architecture, head):
    assert config_from_huggingface(SETTINGS | {"architectures": [architecture]}).head == head


def test_head_by_argument():
    settings = SETTINGS | {"architectures": ["BertForTokenClassification"]}
    assert config_from_huggingface(settings, head="encoder").head == "encoder"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, r"`model_type` is 'mamba'; supported: 'bert'"),
        ({"architectures": ["BertForTokenClassification"]}, r"\['BertForTokenClassification'\]; known: BertModel"),
        ({"architectures": None}, r"`architectures` is None; known: .*`head=`"),
        ({"position_embedding_type": "relative_key"}, r"`position_embedding_type` is 'relative_key'; only 'absolute'"),
        ({"is_decoder": True}, r"`is_decoder` is True; only False"),
        ({"add_cross_attention": True}, r"`add_cross_attention` is True"),
        ({"quantization_config": {"bits": 4}}, r"`quantization_config` is"),
        ({"architectures": ["BertForMaskedLM"], "tie_word_embeddings": False}, r"`tie_word_embeddings` is False"),
        ({"hidden_act": "swish"}, r"`hidden_act` must be one of 'gelu', 'gelu_new', .*'relu', 'silu', got 'swish'"),
        ({"id2label": {"0": "a", "2": "b"}}, r"without gaps, got \[0, 2\]"),
        ({"id2label": ["a", "b"]}, r"`id2label` must map class indices"),
        ({"jaxcompress": [1]}, r"`jaxcompress` must be a mapping"),
        ({"jaxcompress": {"num_attention_heads": [1, 2, 3]}}, r"one entry for each of 2 layers, got 3"),
    ],
)
def test_what_cannot_be_computed_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_huggingface(SETTINGS | changes)


def test_missing_sizes_are_listed():
    settings = {name: value for name, value in SETTINGS.items() if name not in ("vocab_size", "intermediate_size")}
    with pytest.raises(ValueError, match=r"missing: vocab_size, intermediate_size"):
        config_from_huggingface(settings)


def test_untied_setting_does_not_matter_without_a_decoder():
    assert config_from_huggingface(SETTINGS | {"tie_word_embeddings": False}).head == "encoder"


ODD = [
    None, True, False, 0, -1, 5, 2**70, 1.5, math.nan, math.inf, "", "x", "5", [], [5], [[1]], [{}], {}, {"a": 1},
    {"0": 5}, {"0": [9] * 99},
]  # fmt: skip


def test_any_value_of_any_setting_is_read_or_refused_with_the_name_of_the_file(tmp_path):
    own = {"pooling": "mean", "head_size": 32, "num_attention_heads": [2], "intermediate_size": [8]}
    settings = {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 60, "hidden_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 9,
        "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1, "classifier_dropout": None, "initializer_range": 0.02, "num_labels": 2,
        "id2label": {"0": "a", "1": "b"}, "pruned_heads": {}, "is_decoder": False, "tie_word_embeddings": True,
        "position_embedding_type": "absolute", "jaxcompress": own,
    }  # fmt: skip
    changed = [settings | {name: value} for name in settings for value in ODD]
    changed += [settings | {"jaxcompress": own | {name: value}} for name in own for value in ODD]
    refused = []
    for odd in changed:
        (tmp_path / "config.json").write_text(json.dumps(odd))
        try:
            hash(read_config(tmp_path))
        except ValueError as err:
            refused.append(str(err))
    assert len(refused) > len(changed) / 2
    assert all("config.json" in message for message in refused)
