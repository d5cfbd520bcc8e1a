"""How the modules behave: defaults, masks, pooling, dropout, precision, transformations."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress._src.models.bert.family import BERT
from jaxcompress._src.models.bert.heads import BertForMaskedLM, BertForSequenceClassification
from jaxcompress._src.models.bert.parameters import parameter_shapes
from jaxcompress.models import BertConfig, from_pretrained, make_module
from jaxcompress.report import size_report

HEADS = ("encoder", "sequence_classification", "masked_lm")
IDS = np.array([[3, 9, 4, 7, 1], [8, 2, 6, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.fixture
def config():
    return BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
    )


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_parameter_shapes_are_those_of_the_module(uneven_config, head, pooling):
    config = dataclasses.replace(uneven_config, head=head, pooling=pooling)
    tree = jax.eval_shape(make_module(config).init, jax.random.key(0), jnp.zeros((1, 3), int))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    assert {"/".join(k.key for k in path): leaf.shape for path, leaf in leaves} == parameter_shapes(config)


@pytest.mark.parametrize(
    ("cls", "head"), [(BertForMaskedLM, "masked_lm"), (BertForSequenceClassification, "sequence_classification")]
)
def test_class_that_does_not_fit_the_head_is_refused(config, cls, head):
    with pytest.raises(ValueError, match=rf"`config.head` must be '{head}' here, got 'encoder'"):
        cls(config).init(jax.random.key(0), IDS)


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "relu"])
def test_activation_is_the_one_named(config, draw_params, run, hidden_act):
    """One layer whose attention adds nothing, against NumPy."""
    config = dataclasses.replace(
        config, num_hidden_layers=1, num_attention_heads=0, intermediate_size=24, hidden_act=hidden_act
    )
    params = draw_params(config)
    states = run(config, params, IDS, output_hidden_states=True)["hidden_states"]
    layer = jax.tree.map(np.float64, params["encoder"]["layer"]["0"])
    attended = _norm(
        np.float64(states[0]) + layer["attention"]["output"]["dense"]["bias"], layer["attention"]["output"]
    )
    x = attended @ layer["intermediate"]["dense"]["kernel"] + layer["intermediate"]["dense"]["bias"]
    y = _ACTIVATIONS[hidden_act](x) @ layer["output"]["dense"]["kernel"] + layer["output"]["dense"]["bias"]
    np.testing.assert_allclose(states[1], _norm(y + attended, layer["output"]), atol=1e-5)


def test_missing_inputs_mean_all_tokens_type_zero_in_order(config, draw_params, run):
    params = draw_params(config)
    explicit = run(config, params, IDS, np.ones_like(IDS), np.zeros_like(IDS), np.tile(np.arange(5), (2, 1)))
    np.testing.assert_allclose(
        run(config, params, IDS)["last_hidden_state"], explicit["last_hidden_state"], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_changes_nothing(config, draw_params, run, pooling):
    config = dataclasses.replace(config, head="sequence_classification", pooling=pooling)
    params = draw_params(config)
    other = np.where(MASK > 0, IDS, 17)
    first, second = (run(config, params, ids, MASK)["logits"] for ids in (IDS, other))
    np.testing.assert_array_equal(first, second)
    alone = run(config, params, IDS[1:, :3])["logits"]
    np.testing.assert_allclose(first[1:], alone, rtol=0, atol=1e-5)


def test_row_without_tokens_is_finite(config, draw_params, run):
    config = dataclasses.replace(config, pooling="mean")
    outputs = run(config, draw_params(config), IDS, np.zeros_like(IDS))
    assert np.isfinite(outputs["last_hidden_state"]).all()
    np.testing.assert_array_equal(outputs["pooler_output"], 0.0)


def test_mean_pooling_is_the_mean_over_the_mask(config, draw_params, run):
    config = dataclasses.replace(config, head="sequence_classification", pooling="mean")
    params = draw_params(config)
    outputs = run(config, params, IDS, MASK)
    hidden = np.float64(outputs["last_hidden_state"])
    expected = np.stack([row[keep > 0].mean(axis=0) for row, keep in zip(hidden, MASK, strict=True)])
    np.testing.assert_allclose(outputs["pooler_output"], expected, rtol=0, atol=1e-6)
    classifier = jax.tree.map(np.float64, params["classifier"])
    logits = expected @ classifier["kernel"] + classifier["bias"]
    np.testing.assert_allclose(outputs["logits"], logits, rtol=0, atol=1e-5)
    everything = run(config, params, IDS)
    np.testing.assert_allclose(
        everything["pooler_output"], np.mean(everything["last_hidden_state"], axis=1), rtol=0, atol=1e-6
    )


def test_attentions_are_the_softmax_of_the_scores_over_tokens(config, draw_params, run):
    outputs = run(config, draw_params(config), IDS, MASK, output_attentions=True)
    for scores, found in zip(outputs["attention_scores"], outputs["attentions"], strict=True):
        weights = np.exp(np.float64(scores)) * MASK[:, None, None, :]
        np.testing.assert_allclose(found, weights / weights.sum(-1, keepdims=True), rtol=0, atol=1e-6)


def test_outputs_that_are_not_asked_for_are_absent(config, draw_params, run):
    assert set(run(config, draw_params(config), IDS)) == {"last_hidden_state", "pooler_output"}
    config = dataclasses.replace(config, head="masked_lm")
    assert set(run(config, draw_params(config), IDS)) == {"last_hidden_state", "logits"}


def test_dropout_follows_its_key_and_its_rate(config, draw_params, run):
    config = dataclasses.replace(config, head="sequence_classification")
    params = draw_params(config)
    dropped = [
        run(config, params, IDS, MASK, deterministic=False, dropout=jax.random.key(seed))["logits"]
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert np.abs(dropped[0] - dropped[2]).max() > 1e-3
    still = dataclasses.replace(config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    np.testing.assert_array_equal(
        run(still, params, IDS, MASK, deterministic=False)["logits"], run(config, params, IDS, MASK)["logits"]
    )


@pytest.mark.parametrize("only", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"])
def test_every_rate_drops_something(config, draw_params, run, only):
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    config = dataclasses.replace(config, head="sequence_classification", **rates | {only: 0.5})
    params = draw_params(config)
    dropped = run(config, params, IDS, MASK, deterministic=False, dropout=jax.random.key(0))["logits"]
    assert np.abs(dropped - run(config, params, IDS, MASK)["logits"]).max() > 1e-3


@pytest.mark.parametrize("head", HEADS)
def test_bfloat16_keeps_softmax_in_float32(golden_dir, golden, inputs, head):
    module, params = from_pretrained(golden_dir, head=head, dtype=jnp.bfloat16)
    outputs = jax.jit(lambda p: module.apply({"params": p}, **inputs, output_attentions=True))(params)
    name = "last_hidden_state" if head == "encoder" else "logits"
    assert outputs[name].dtype == jnp.bfloat16
    expected = golden[f"{head}/{name}"]
    assert np.abs(np.float32(outputs[name]) - expected).max() < 0.03 * np.abs(expected).max()
    for attention in outputs["attentions"]:
        assert attention.dtype == jnp.float32
        np.testing.assert_allclose(attention.sum(axis=-1), 1.0, rtol=0, atol=1e-6)


def test_bfloat16_parameters_in_float32_computation(config, draw_params, run):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), draw_params(config))
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    found, expected = (run(config, p, IDS, MASK)["last_hidden_state"] for p in (params, widened))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_jit_equals_eager_and_vmap_equals_a_batch(uneven_config, draw_params, head):
    config = dataclasses.replace(uneven_config, head=head)
    module, params = make_module(config), draw_params(config)
    name = "last_hidden_state" if head == "encoder" else "logits"

    def apply(ids, mask):
        return module.apply({"params": params}, ids, mask)[name]

    eager = apply(IDS, MASK)
    np.testing.assert_allclose(jax.jit(apply)(IDS, MASK), eager, rtol=0, atol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.vmap(apply))(IDS, MASK), eager, rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_gradients_are_finite_and_reach_every_weight(uneven_config, draw_params, head):
    config = dataclasses.replace(uneven_config, head=head)
    module, params = make_module(config), draw_params(config)

    def loss(p):
        outputs = module.apply({"params": p}, IDS, MASK)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in outputs.values())

    for path, grad in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        where = jax.tree_util.keystr(path)
        assert np.isfinite(grad).all(), where
        # Adding one vector to every key moves all scores of a query alike: the softmax does not see it.
        assert grad.size == 0 or "'key']['bias'" in where or np.abs(grad).max() > 0, where


def test_one_trace_for_one_shape(config, draw_params):
    module, params, traces = make_module(config), draw_params(config), []

    @jax.jit
    def apply(p, ids):
        traces.append(1)
        return module.apply({"params": p}, ids)["last_hidden_state"]

    for shift in range(3):
        apply(params, IDS + shift)
    assert len(traces) == 1


def test_shapes_that_differ_are_refused(config, draw_params, run):
    with pytest.raises(
        ValueError, match=r"`attention_mask` must have the shape of `input_ids`, \(2, 5\), got \(2, 4\)"
    ):
        run(config, draw_params(config), IDS, MASK[:, :4])


def test_more_tokens_than_positions_are_refused(config, draw_params, run):
    with pytest.raises(ValueError, match=r"has 9 tokens; `max_position_embeddings` is 8"):
        run(config, draw_params(config), np.zeros((1, 9), int))


def _norm(x, params):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
    return x * params["LayerNorm"]["scale"] + params["LayerNorm"]["bias"]


_ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))),
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


def test_bytes_are_counted_by_the_last_key():
    params = {"embedding": {"kernel": jnp.ones(1)}, "word": {"embedding": jnp.ones(2)}, "my_embedding": jnp.ones(4)}
    report = size_report(params, group_by=BERT.parts)
    assert {leaf.path: leaf.group for leaf in report.leaves} == {
        "embedding/kernel": "encoder",
        "word/embedding": "embedding",
        "my_embedding": "encoder",
    }
    assert [group.name for group in report.groups] == ["encoder", "embedding"]
