"""RoBERTa, XLM-RoBERTa and DistilBERT: what they do not share with BERT; see test_golden.py for their outputs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from jaxcompress._src.models.bert.parameters import parameter_shapes
from jaxcompress._src.models.families import max_tokens
from jaxcompress._src.models.hf.config import config_from_huggingface, config_to_huggingface, read_config
from jaxcompress._src.units.shrink import mask_units
from jaxcompress.models import BertConfig, from_pretrained, make_module, resized, save_pretrained, unit_groups
from jaxcompress.structured import shrink

HEADS = ("encoder", "sequence_classification", "masked_lm")
VARIANTS = ("roberta", "xlm-roberta", "distilbert")
TRANSFORMED = ("roberta", "distilbert")
IDS = np.array([[3, 9, 4, 7, 1], [8, 2, 6, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def small(model_type, **changes):
    """Nothing is square, and nothing but the hidden width is 12."""
    sizes = {
        "vocab_size": 30, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": (3, 2),
        "intermediate_size": (7, 11), "head_size": 5, "max_position_embeddings": 9, "num_labels": 3,
        "head": "sequence_classification",
    }  # fmt: skip
    return BertConfig(model_type=model_type, **sizes | changes)


@pytest.fixture
def golden_copy(variant_golden, tmp_path):
    """A copy of a variant's golden directory, with other tensors."""

    def copy(variant, change):
        directory = variant_golden(variant)[0]
        (tmp_path / "config.json").write_text((directory / "config.json").read_text())
        tensors = change(load_file(directory / "model.safetensors"))
        save_file(
            {name: np.ascontiguousarray(array) for name, array in tensors.items()}, tmp_path / "model.safetensors"
        )
        return tmp_path

    return copy


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("variant", TRANSFORMED)
def test_parameter_shapes_are_those_of_the_module(variant, head, pooling):
    config = small(variant, head=head, pooling=pooling, num_attention_heads=(3, 0), intermediate_size=(0, 11))
    tree = jax.eval_shape(make_module(config).init, jax.random.key(0), jnp.zeros((1, 3), int))["params"]
    found = {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}
    assert found == parameter_shapes(config)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_uneven_round_trip(draw_params, assert_same_params, tmp_path, variant, head, pooling):
    config = small(variant, head=head, pooling=pooling)
    params = draw_params(config)
    save_pretrained(tmp_path, make_module(config), params, uneven=True)
    module, found = from_pretrained(tmp_path)
    assert module.config == config
    assert_same_params(found, params)
    with pytest.raises(ValueError, match="numbers of heads differ: 3 in layer 0, 2 in layer 1"):
        save_pretrained(tmp_path, make_module(config), params)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("variant", TRANSFORMED)
def test_names_and_settings_are_those_of_the_golden_files(variant_golden, tmp_path, variant, head):
    directory = variant_golden(variant)[0]
    save_pretrained(tmp_path, *from_pretrained(directory, head=head))
    golden, found = (load_file(path / "model.safetensors") for path in (directory, tmp_path))
    if head == "encoder":  # transformers names the tensors of a bare model without the prefix
        golden = {name.removeprefix(f"{variant}."): tensor for name, tensor in golden.items()}
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor, golden[name], err_msg=name)
    heads = {
        "roberta": {"sequence_classification": ("classifier.",), "masked_lm": ("lm_head.",), "encoder": ("pooler.",)},
        "distilbert": {"sequence_classification": ("classifier.", "pre_classifier."), "masked_lm": ("vocab_",)},
    }[variant]
    every = tuple(start for starts in heads.values() for start in starts)
    bare = {name for name in golden if not name.removeprefix(f"{variant}.").startswith(every)}
    assert set(found) == bare | {name for name in golden if name.startswith(heads.get(head, "-"))}
    written, settings = (json.loads((path / "config.json").read_text()) for path in (tmp_path, directory))
    architecture = settings["architectures"][0].removesuffix("ForSequenceClassification")
    ending = {"encoder": "Model", "masked_lm": "ForMaskedLM"}.get(head, "ForSequenceClassification")
    assert written.items() >= (settings | {"architectures": [architecture + ending]}).items()
    assert "jaxcompress" not in written


@pytest.mark.parametrize("variant", TRANSFORMED)
@pytest.mark.parametrize("prefix", [True, False])
def test_flax_msgpack(variant_golden, assert_same_params, tmp_path, variant, prefix):
    directory = variant_golden(variant)[0]
    module, params = from_pretrained(directory)
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    tree = jax.tree.map(np.asarray, params)
    tree = tree if prefix else {**tree.pop(variant), **tree}
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    found, restored = from_pretrained(tmp_path)
    assert found == module
    assert_same_params(restored, params)


DECODERS = {"roberta": "lm_head.decoder", "distilbert": "vocab_projector"}


@pytest.mark.parametrize("variant", TRANSFORMED)
@pytest.mark.parametrize("head", HEADS)
def test_copies_that_pytorch_stores_are_dropped(variant_golden, golden_copy, assert_same_params, variant, head):
    def add(tensors):
        bias = {"roberta": "lm_head.bias", "distilbert": "vocab_projector.bias"}[variant]
        words = tensors[f"{variant}.embeddings.word_embeddings.weight"]
        copies = {f"{DECODERS[variant]}.weight": words, f"{DECODERS[variant]}.bias": tensors[bias]}
        return tensors | copies | {f"{variant}.embeddings.position_ids": np.arange(17)[None]}

    expected = from_pretrained(variant_golden(variant)[0], head=head)[1]
    assert_same_params(from_pretrained(golden_copy(variant, add), head=head)[1], expected)


@pytest.mark.parametrize("variant", TRANSFORMED)
def test_decoder_that_is_not_tied_is_refused(golden_copy, variant):
    name = f"{DECODERS[variant]}.weight"
    words = f"{variant}.embeddings.word_embeddings.weight"
    directory = golden_copy(variant, lambda tensors: tensors | {name: tensors[words] + 1})
    with pytest.raises(ValueError, match=rf"'{name}' differs from '{words}'"):
        from_pretrained(directory, head="masked_lm")
    assert from_pretrained(directory, head="encoder")


NEW = {
    ("roberta", "sequence_classification"): ("classifier.",),
    ("roberta", "masked_lm"): ("lm_head.",),
    ("roberta", "encoder"): ("roberta.pooler.",),
    ("distilbert", "sequence_classification"): ("pre_classifier.", "classifier."),
    ("distilbert", "masked_lm"): ("vocab_",),
}


@pytest.mark.parametrize(("variant", "head"), NEW)
def test_absent_head_is_new_with_a_key(variant_golden, golden_copy, assert_same_params, variant, head):
    def drop(tensors):
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(NEW[variant, head])}

    directory = golden_copy(variant, drop)
    labels = 5 if head == "sequence_classification" else None
    module, params = from_pretrained(directory, head=head, num_labels=labels, key=jax.random.key(0))
    known = from_pretrained(variant_golden(variant)[0], head=head)[1]
    parts = ("embeddings", "encoder", "transformer")
    bodies = [
        {name: leaf for name, leaf in tree.get(variant, tree).items() if name in parts} for tree in (params, known)
    ]
    assert_same_params(*bodies)
    new = {"pooler": params["pooler"]} if head == "encoder" else {k: v for k, v in params.items() if k != variant}
    for path, leaf in flatten_dict(new, sep="/").items():
        if path.endswith("kernel"):
            assert 0.01 < np.std(leaf) < 0.03, path
        else:
            np.testing.assert_array_equal(leaf, float(path.endswith("scale")), err_msg=path)
    if head == "sequence_classification":
        assert (module.config.num_labels, new["classifier"].get("out_proj", new["classifier"])["bias"].shape) == (
            5,
            (5,),
        )
    with pytest.raises(ValueError, match=r"missing tensors: .* Give `head=` and `key=` for a new head"):
        from_pretrained(_as(directory, head))


def _as(directory, head):
    """The same files, whose config.json names the class of a head."""
    settings = config_to_huggingface(read_config(directory, head=head))
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize(
    ("variant", "head", "missing"),
    [
        ("roberta", "sequence_classification", "classifier.dense.bias"),
        ("roberta", "masked_lm", "lm_head.bias"),
        ("distilbert", "sequence_classification", "pre_classifier.weight"),
        ("distilbert", "masked_lm", "vocab_projector.bias"),
        ("distilbert", "masked_lm", "distilbert.transformer.layer.1.ffn.lin2.bias"),
    ],
)
def test_part_of_a_head_is_damaged_not_new(golden_copy, variant, head, missing):
    directory = golden_copy(variant, lambda tensors: {k: v for k, v in tensors.items() if k != missing})
    with pytest.raises(ValueError, match=rf"missing tensors: '{missing}'\.$"):
        from_pretrained(directory, head=head, key=jax.random.key(0))


@pytest.mark.parametrize(("variant", "option"), [("roberta", "num_hidden_layers"), ("distilbert", "n_layers")])
def test_layers_beside_those_of_the_config_are_refused(golden_copy, variant, option):
    directory = golden_copy(variant, lambda tensors: tensors)
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(settings | {option: 1}))
    with pytest.raises(ValueError, match=rf"there are 2 layers; expected 1, by `{option}` of config.json"):
        from_pretrained(directory)


def test_positions_of_a_roberta_are_counted_over_tokens(draw_params, run):
    config = small("roberta", head="encoder")
    assert (config.position_offset, config.max_tokens, max_tokens(make_module(config))) == (2, 7, 7)
    params = draw_params(config)
    mask = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 1]])
    ids = np.where(mask > 0, np.array([[9, 4, 7, 20]] * 3)[np.arange(3)[:, None], np.cumsum(mask, 1) - 1], 1)
    found = np.asarray(run(config, params, ids, mask)["last_hidden_state"])
    alone = np.asarray(run(config, params, ids[:1, 2:])["last_hidden_state"])[0]
    for row, keep in zip(found, mask, strict=True):
        np.testing.assert_allclose(row[keep > 0], alone, rtol=0, atol=1e-5)
    positions = np.where(mask > 0, np.cumsum(mask, axis=1) + 1, 1)
    given = run(config, params, ids, mask, None, positions)["last_hidden_state"]
    np.testing.assert_allclose(given, found, rtol=0, atol=1e-6)
    other = run(config, params, np.where(mask > 0, ids, 17), mask)["last_hidden_state"]
    np.testing.assert_array_equal(np.asarray(other)[mask > 0], found[mask > 0])


def test_more_tokens_than_a_roberta_has_positions_for_are_refused(draw_params, run):
    config = small("roberta", head="encoder")
    params = draw_params(config)
    assert run(config, params, np.full((1, 7), 5))["last_hidden_state"].shape == (1, 7, 12)
    message = r"has 8 tokens; `max_position_embeddings` is 9, of which the first 2 are not for tokens"
    for mask in (None, np.eye(8, dtype=int)[:1]):
        with pytest.raises(ValueError, match=message):
            run(config, params, np.full((1, 8), 5), mask)


def test_distilbert_has_no_token_types(draw_params, run):
    config = small("distilbert", head="encoder")
    with pytest.raises(ValueError, match="A DistilBERT has no token types: leave out `token_type_ids`"):
        run(config, draw_params(config), IDS, MASK, np.zeros_like(IDS))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("variant", TRANSFORMED)
def test_classifier_reads_what_the_pooling_says(draw_params, run, variant, pooling):
    """The classifier by NumPy, in float64."""
    config = small(variant, pooling=pooling)
    params = draw_params(config)
    outputs = run(config, params, IDS, MASK)
    hidden = np.float64(outputs["last_hidden_state"])
    mean = (hidden * MASK[..., None]).sum(1) / MASK.sum(1, keepdims=True)
    read = hidden[:, 0] if pooling == "cls" else mean
    leaves = jax.tree.map(np.float64, params)
    if variant == "roberta":
        first, last, activation = leaves["classifier"]["dense"], leaves["classifier"]["out_proj"], np.tanh
    else:
        first, last = leaves["pre_classifier"], leaves["classifier"]
        activation = lambda x: np.maximum(x, 0)  # noqa: E731
    pooled = activation(read @ first["kernel"] + first["bias"])
    np.testing.assert_allclose(outputs["pooler_output"], pooled, rtol=0, atol=1e-5)
    np.testing.assert_allclose(outputs["logits"], pooled @ last["kernel"] + last["bias"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", TRANSFORMED)
def test_every_rate_drops_something(draw_params, variant):
    still = small(variant, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)
    params = draw_params(still)

    @jax.jit
    def logits(params, key):
        rates = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
        configs = [still, *(dataclasses.replace(still, **{rate: 0.5}) for rate in rates)]
        options = {"deterministic": False, "rngs": {"dropout": key}}
        return [make_module(config).apply({"params": params}, IDS, MASK, **options)["logits"] for config in configs]

    (whole, *dropped), (_, *others) = (logits(params, jax.random.key(seed)) for seed in (0, 1))
    for first, second in zip(dropped, others, strict=True):
        assert np.abs(first - whole).max() > 1e-3
        assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("variant", TRANSFORMED)
def test_bfloat16_keeps_softmax_in_float32(variant_golden, variant):
    directory, _, golden = variant_golden(variant)
    module, params = from_pretrained(directory, head="masked_lm", dtype=jnp.bfloat16)
    ids, mask = golden["input/input_ids"], golden["input/attention_mask"]
    outputs = jax.jit(lambda p: module.apply({"params": p}, ids, mask, output_attentions=True))(params)
    assert outputs["logits"].dtype == jnp.bfloat16
    expected = golden["masked_lm/logits"]
    assert np.abs(np.float32(outputs["logits"]) - expected).max() < 0.03 * np.abs(expected).max()
    assert {attention.dtype for attention in outputs["attentions"]} == {jnp.dtype("float32")}


@pytest.mark.parametrize("variant", TRANSFORMED)
@pytest.mark.parametrize("head", ["sequence_classification", "masked_lm"])
def test_masked_equals_shrunk(draw_params, run, variant, head):
    config = small(variant, head=head)
    params, rng = draw_params(config), np.random.default_rng(0)
    groups = unit_groups(config, kinds=["heads", "columns", "attentions", "ffns"])
    parts = {"roberta": "roberta/encoder", "distilbert": "distilbert/transformer"}[variant]
    assert [group.name for group in groups[-2:]] == [f"{parts}/attentions", f"{parts}/ffns"]
    assert groups[0].name == f"{parts}/layer/0/heads"
    keep = {group.name: rng.random(group.count) < 0.6 for group in groups[:-2]}
    keep |= {f"{parts}/attentions": [True, False], f"{parts}/ffns": [False, True]}
    shrunk = shrink(params, groups, keep)
    smaller = resized(make_module(config), shrunk).config
    assert smaller.num_attention_heads == (keep[f"{parts}/layer/0/heads"].sum(), 0)
    assert smaller.intermediate_size == (0, keep[f"{parts}/layer/1/columns"].sum())
    assert 0 < smaller.num_attention_heads[0] < 3
    expected = run(config, mask_units(params, groups, keep), IDS, MASK, output_hidden_states=True)
    found = run(smaller, shrunk, IDS, MASK, output_hidden_states=True)
    np.testing.assert_allclose(found["logits"], expected["logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.stack(found["hidden_states"]), np.stack(expected["hidden_states"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", TRANSFORMED)
@pytest.mark.parametrize("head", HEADS)
def test_hidden_units_are_every_axis_of_that_width(draw_params, variant, head):
    config = small(variant, head=head)
    params, kept = draw_params(config), np.arange(12) % 4 != 2
    shrunk = shrink(params, unit_groups(config, kinds=["hidden"]), {"hidden": kept})
    by_hand = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        for axis, size in enumerate(leaf.shape):
            leaf = np.compress(kept, leaf, axis=axis) if size == 12 else leaf
        by_hand[path] = leaf
    jax.tree.map(np.testing.assert_array_equal, shrunk, unflatten_dict(by_hand, sep="/"))
    smaller = resized(make_module(config), shrunk)
    assert (smaller.config.hidden_size, smaller.config.head_size) == (9, 5)
    # Gates are on what writes to the stream: with all of them at 0, nothing is left of it.
    masked = mask_units(params, unit_groups(config, kinds=["hidden"]), {"hidden": np.zeros(12, bool)})
    if head == "masked_lm":
        outputs = jax.jit(make_module(config).apply)({"params": masked}, IDS, MASK)
        np.testing.assert_array_equal(outputs["last_hidden_state"], 0.0)


SETTINGS = {
    "roberta": {
        "model_type": "roberta", "architectures": ["RobertaModel"], "vocab_size": 60, "hidden_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 19,
        "type_vocab_size": 1, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "pad_token_id": 5,
    },
    "distilbert": {
        "model_type": "distilbert", "architectures": ["DistilBertModel"], "vocab_size": 60, "dim": 64, "n_layers": 1,
        "n_heads": 2, "hidden_dim": 8, "max_position_embeddings": 19, "activation": "gelu", "dropout": 0.3,
        "attention_dropout": 0.4, "seq_classif_dropout": 0.25, "sinusoidal_pos_embds": True, "pad_token_id": 0,
        "jaxcompress": {"pooling": "mean", "head_size": 32, "num_attention_heads": [2], "intermediate_size": [8]},
    },
}  # fmt: skip


def test_settings_become_fields():
    config = config_from_huggingface(SETTINGS["distilbert"])
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 1, (2,))
    assert (config.intermediate_size, config.hidden_act, config.type_vocab_size) == ((8,), "gelu", 0)
    rates = (config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.classifier_dropout)
    assert rates == (0.3, 0.4, 0.25)
    assert config.extra == {"sinusoidal_pos_embds": True, "pad_token_id": 0}
    config = config_from_huggingface(SETTINGS["roberta"])
    assert (config.position_offset, config.max_tokens, config.type_vocab_size, config.extra) == (6, 13, 1, {})


def test_what_settings_leave_out_is_as_in_transformers():
    bare = {name: value for name, value in SETTINGS["roberta"].items() if name != "pad_token_id"}
    assert config_from_huggingface(bare).position_offset == 2
    bare = {name: value for name, value in SETTINGS["distilbert"].items() if "dropout" not in name}
    config = config_from_huggingface(bare)
    rates = (config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.classifier_dropout)
    assert rates == (0.1, 0.1, 0.2)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("head", HEADS)
def test_config_survives_json(variant, head):
    offset = {} if variant == "distilbert" else {"position_offset": 4}
    for changes in ({}, offset, {"classifier_dropout": 0.4, "hidden_act": "relu", "extra": {"nested": {"a": [None]}}}):
        config = small(variant, head=head, **changes)
        settings = json.loads(json.dumps(config_to_huggingface(config)))
        assert config_from_huggingface(settings) == config
        assert hash(config) == hash(dataclasses.replace(config))
    architectures = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "distilbert": "DistilBert"}
    assert settings["architectures"][0].startswith(architectures[variant])


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("distilbert", {"dim": None}, r"`dim` must be an int in"),
        ("distilbert", {"n_layers": 2**31}, r"`n_layers` must be an int in"),
        ("distilbert", {"architectures": ["BertModel"]}, r"\['BertModel'\]; known: DistilBertModel, DistilBertForSeq"),
        ("roberta", {"pad_token_id": None}, r"`pad_token_id` must be an int of at least 0, got None"),
        ("roberta", {"pad_token_id": 18}, r"`max_position_embeddings` must be above `position_offset`, 19, got 19"),
        ("roberta", {"position_embedding_type": "relative_key"}, r"only 'absolute' is supported"),
        ("roberta", {"architectures": ["RobertaForCausalLM"]}, r"known: RobertaModel, RobertaForSequenceClassifi"),
    ],
)
def test_what_cannot_be_computed_is_refused(variant, changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_huggingface(SETTINGS[variant] | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "albert"}, r"`model_type` must be one of 'bert', 'roberta', 'xlm-roberta', 'distilbert'"),
        ({"model_type": "distilbert", "type_vocab_size": 2}, r"`type_vocab_size` of a DistilBERT is 0, got 2"),
        ({"model_type": "distilbert", "layer_norm_eps": 1e-5}, r"`layer_norm_eps` of a DistilBERT is 1e-12, got 1e-05"),
        ({"model_type": "bert", "position_offset": 2}, r"`position_offset` of a BERT is 0, got 2"),
        ({"model_type": "roberta", "position_offset": 0}, r"`position_offset` must be an int of at least 1, got 0"),
        ({"model_type": "roberta", "type_vocab_size": 0}, r"`type_vocab_size` must be an int of at least 1, got 0"),
    ],
)
def test_fields_that_a_variant_does_not_have_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


ODD = [None, True, -1, 5, 2**70, 1.5, float("nan"), "", "x", [], [5], [[1]], {}, {"a": 1}, {"0": 5}]


@pytest.mark.parametrize("variant", SETTINGS)
def test_any_value_of_any_setting_is_read_or_refused_with_the_name_of_the_file(tmp_path, variant):
    settings, refused, count = SETTINGS[variant], [], 0
    for name in settings:
        for value in ODD:
            (tmp_path / "config.json").write_text(json.dumps(settings | {name: value}))
            count += 1
            try:
                hash(read_config(tmp_path))
            except ValueError as err:
                refused.append(str(err))
    assert count / 2 < len(refused) < count
    assert all("config.json" in message for message in refused)
