"""Decoding with a cache: equal to reading everything again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress._src.models.decoder.generate import _restricted, _Sampling
from jaxcompress.models import BertConfig, GPT2Config, LlamaConfig, generate, init_cache, make_module

MODELS = {
    "llama": LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=(4, 2),
        num_key_value_heads=(2, 1),
        head_size=6,
        intermediate_size=(20, 12),
        max_position_embeddings=24,
        sliding_window=(None, 3),
        qk_norm=True,
        qkv_bias=True,
        tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=(2, 1),
        head_size=6,
        intermediate_size=20,
        max_position_embeddings=24,
    ),
}
# Rows of padding on the right, none, and on the left.
IDS = np.array([[5, 9, 2, 7, 0, 0], [3, 1, 4, 1, 5, 9], [0, 0, 0, 8, 2, 6]], np.int32)
MASK = np.array([[1, 1, 1, 1, 0, 0], [1] * 6, [0, 0, 0, 1, 1, 1]], np.int32)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    module = make_module(MODELS[request.param])
    params = jax.jit(module.init)(jax.random.key(0), IDS)["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return module, jax.tree.unflatten(structure, noisy)


@pytest.fixture(scope="module")
def full(model):
    module, params = model
    run = jax.jit(lambda ids, mask: module.apply({"params": params}, ids, mask)["logits"])
    # One shape: what comes later is not seen.
    return lambda ids: run(*(np.pad(part, ((0, 0), (0, 24 - len(ids[0])))) for part in (ids, np.ones_like(ids))))


def _greedy(full, row, count):
    row = list(row)
    for _ in range(count):
        logits = full(np.array([row] * 3))[0, len(row) - 1]
        row.append(int(logits.argmax()))
    return row[-count:]


def test_reading_in_parts_is_reading_at_once(model):
    module, params = model
    run = jax.jit(lambda ids, mask, cache: module.apply({"params": params}, ids, mask, cache=cache))
    whole = run(IDS, MASK, None)["logits"]
    cache, parts = init_cache(module.config, 3, 9), []
    for start, end in ((0, 3), (3, 4), (4, 6)):
        outputs = run(IDS[:, start:end], MASK[:, start:end], cache)
        cache = outputs["cache"]
        parts.append(outputs["logits"])
    assert int(cache.length) == 6
    assert cache.mask.sum() == MASK.sum()
    np.testing.assert_allclose(np.concatenate(parts, 1)[MASK > 0], whole[MASK > 0], rtol=1e-5, atol=1e-5)


def test_padding_on_either_side_changes_nothing(model):
    module, params = model
    run = jax.jit(lambda ids, mask: module.apply({"params": params}, ids, mask)["logits"])
    logits = run(IDS, MASK)
    left = run(np.roll(IDS, 2, axis=1), np.roll(MASK, 2, axis=1))
    np.testing.assert_allclose(logits[0, :4], left[0, 2:], rtol=1e-5, atol=1e-5)


def test_generation_is_that_of_each_row_alone_without_a_cache(model, full):
    module, params = model
    tokens, lengths = generate(module, params, IDS, MASK, max_new_tokens=7)
    wanted = [_greedy(full, row[mask > 0], 7) for row, mask in zip(IDS, MASK, strict=True)]
    np.testing.assert_array_equal(tokens, wanted)
    assert lengths.tolist() == [7, 7, 7]
    # Every row ends with the token that it gave fourth.
    stops = sorted({row[3] for row in wanted})
    tokens, lengths = generate(module, params, IDS, MASK, max_new_tokens=7, stop_tokens=stops, pad_token=30)
    for row, length, greedy in zip(np.asarray(tokens), lengths.tolist(), wanted, strict=True):
        ends = 1 + min(greedy.index(stop) for stop in stops if stop in greedy)
        assert (length, row.tolist()) == (ends, [*greedy[:ends], *[30] * (7 - ends)])


def test_compressed_leaves_generate_what_they_stand_for(model):
    module, params = model
    kernels = jc.tree.by_path(".*kernel")
    small, _ = jc.quantization.quantize(params, jc.quantization.QuantSpec(bits=4, group_size=2), select=kernels)
    wanted = generate(module, jc.materialize(small), IDS, MASK, max_new_tokens=5)
    np.testing.assert_array_equal(generate(module, small, IDS, MASK, max_new_tokens=5).tokens, wanted.tokens)


def test_a_cache_of_8_bits_holds_rounded_keys_and_values(model):
    module, params = model
    run = jax.jit(lambda ids, cache: module.apply({"params": params}, ids, cache=cache))
    plain = run(IDS, init_cache(module.config, 3, 6))
    rounded = run(IDS, init_cache(module.config, 3, 6, bits=8))
    for exact, rows in zip(plain["cache"].keys[:1], rounded["cache"].keys[:1], strict=True):
        assert (rows.codes.dtype, rows.scale.dtype) == (jnp.int8, jnp.float32)
        scale = np.abs(np.asarray(exact.codes, np.float64)).max(-1) / 127
        np.testing.assert_allclose(rows.scale, scale, rtol=1e-6)
        error = np.abs(np.asarray(rows.codes * rows.scale[..., None]) - np.asarray(exact.codes))
        assert (error <= scale[..., None] * 0.501).all()
    change = np.abs(rounded["logits"] - plain["logits"]).max()
    assert 0 < change < 0.1 * np.abs(plain["logits"]).max()
    bytes_of = [sum(leaf.nbytes for leaf in jax.tree.leaves(each["cache"].keys)) for each in (plain, rounded)]
    assert bytes_of[1] == bytes_of[0] * (6 + 4) / (6 * 4)


def test_logits_of_the_last_place_or_none(model):
    module, params = model
    outputs = module.apply({"params": params}, IDS)
    last = module.apply({"params": params}, IDS, logits="last")
    np.testing.assert_allclose(last["logits"][:, 0], outputs["logits"][:, -1], rtol=1e-6)
    assert "logits" not in module.apply({"params": params}, IDS, logits="none")
    with pytest.raises(ValueError, match="`logits` must be one of 'all', 'last', 'none', got 'first'"):
        module.apply({"params": params}, IDS, logits="first")


def _numpy_restricted(logits, top_k, top_p):
    kept = np.full(len(logits), -np.inf)
    order = np.argsort(-logits, kind="stable")[:top_k]
    shares = np.exp(logits[order]) / np.exp(logits[order]).sum()
    total = 0.0
    for place, share in zip(order, shares, strict=True):
        if total >= top_p:
            break
        kept[place], total = logits[place], total + share
    return kept


@pytest.mark.parametrize(("top_k", "top_p"), [(3, None), (None, 0.6), (5, 0.8), (100, 1.0), (1, 0.01)])
def test_what_may_be_drawn(top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(4, 12)).astype(np.float32) * 2
    got = _restricted(jnp.asarray(logits), _Sampling(1, 1.0, top_k, top_p, (), 0, None))
    wanted = [_numpy_restricted(row.astype(np.float64), top_k or 12, top_p or 1.0) for row in logits]
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_drawing_follows_the_distribution(model, full):
    module, params = model
    prompts = np.repeat(IDS[1:2], 400, axis=0)
    tokens, _ = generate(module, params, prompts, max_new_tokens=1, temperature=2.0, key=jax.random.key(3))
    logits = np.asarray(full(IDS[[1, 1, 1]])[0, 5], np.float64) / 2.0
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    drawn = np.bincount(np.asarray(tokens)[:, 0], minlength=31) / 400
    assert np.abs(drawn - shares).max() < 4 * np.sqrt(0.25 / 400)
    again, _ = generate(module, params, prompts, max_new_tokens=1, temperature=2.0, key=jax.random.key(3))
    np.testing.assert_array_equal(tokens, again)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 19}, "6 tokens of the prompts and 19 new ones are more than the 24 positions of the model"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
        ({"temperature": -1.0}, "`temperature` must be at least 0, got -1.0"),
        ({"temperature": 1.0}, "needs `key`"),
        ({"temperature": 1.0, "key": jax.random.key(0), "top_k": 0}, "`top_k` must be at least 1, got 0"),
        ({"temperature": 1.0, "key": jax.random.key(0), "top_p": 0.0}, r"`top_p` must be in \(0, 1\], got 0.0"),
        ({"top_k": 3}, "restrict what is drawn: give a `temperature` above 0"),
        ({"attention_mask": MASK[:, 1:]}, r"`attention_mask` must have the shape of `input_ids`, \(3, 6\), got"),
        ({"attention_mask": MASK * [[1], [0], [1]]}, "Row 1 of `input_ids` has no token"),
        ({"stop_tokens": [2, 31]}, "`stop_tokens` has the token 31; `vocab_size` is 31"),
        ({"input_ids": IDS + 25}, "has the token 34; `vocab_size` is 31"),
        ({"input_ids": IDS.astype(float)}, r"must be integers \(rows, tokens\), got float64\[3, 6\]"),
        ({"cache_bits": 4}, "`bits` of a cache must be 8 or None, got 4"),
    ],
)
def test_errors_name_the_option(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(*model, **({"input_ids": IDS, "max_new_tokens": 3} | options))


def test_a_cache_that_is_too_small_is_refused(model):
    module, params = model
    with pytest.raises(ValueError, match="`capacity` must be between 1 and `max_position_embeddings`, 24, got 25"):
        init_cache(module.config, 1, 25)
    cache = module.apply({"params": params}, IDS, cache=init_cache(module.config, 3, 8))["cache"]
    with pytest.raises(ValueError, match="The cache has 8 places, of which 6 are taken: 6 more tokens do not fit"):
        module.apply({"params": params}, IDS, cache=cache)
    with pytest.raises(ValueError, match=r"The cache is of rows \(3,\), `input_ids` of \(2,\)"):
        module.apply({"params": params}, IDS[:2], cache=cache)


def test_only_language_models_generate():
    config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    with pytest.raises(ValueError, match=r"needs a causal language model of `jaxcompress.models`, got BertModel"):
        generate(make_module(config), {}, IDS, max_new_tokens=1)
