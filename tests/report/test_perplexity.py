"""Perplexity over windows, against a loop in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.report import perplexity

VOCABULARY = 11


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return {"words": jnp.asarray(rng.normal(size=(VOCABULARY, 6)), jnp.float32)}


def _apply(params, ids, mask):
    """What comes next depends on the mean of the tokens so far in the window."""
    vectors = params["words"][ids] * mask[..., None]
    counts = jnp.broadcast_to(jnp.arange(1.0, ids.shape[1] + 1)[None, :, None], vectors.shape)
    return jnp.einsum("bld,vd->blv", jnp.cumsum(vectors, axis=1) / counts, params["words"])


def _reference(words, texts, window, stride, masks=None):
    """-log p of every token that counts, and the text and window in which it was predicted."""
    terms, owners = [], []
    for number, ids in enumerate(texts):
        for place in range(1, len(ids)):
            # The first window that reaches the token.
            start = 0 if place < window else -(-(place + 1 - window) // stride) * stride
            context = words[ids[start:place]].mean(0)
            logits = words @ context
            if masks is None or masks[number][place]:
                terms.append(np.log(np.exp(logits).sum()) - logits[ids[place]])
                owners.append((number, start))
    return np.array(terms), owners


@pytest.mark.parametrize(("window", "stride"), [(8, None), (8, 7), (5, 1), (64, 3)])
def test_every_token_is_predicted_once_by_the_first_window_that_reaches_it(params, window, stride):
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, VOCABULARY, length) for length in (23, 1, 8, 2, 0, 40)]
    result = perplexity(_apply, params, texts, window=window, stride=stride, batch_size=3)
    words = np.asarray(params["words"], np.float64)
    terms, owners = _reference(words, texts, window, stride or window // 2)
    assert result.count == len(terms) == sum(max(len(text) - 1, 0) for text in texts)
    np.testing.assert_allclose(result.mean, terms.mean(), rtol=1e-6)
    np.testing.assert_allclose(result.perplexity, np.exp(terms.mean()), rtol=1e-6)
    groups = [[term for term, owner in zip(terms, owners, strict=True) if owner == each] for each in set(owners)]
    spread = sum((sum(group) - terms.mean() * len(group)) ** 2 for group in groups) * len(groups) / (len(groups) - 1)
    np.testing.assert_allclose(result.standard_error, np.sqrt(spread) / len(terms), rtol=1e-5)
    np.testing.assert_allclose(result.high, np.exp(terms.mean() + 1.959964 * result.standard_error), rtol=1e-5)


def test_masked_tokens_are_read_and_do_not_count(params):
    texts = [np.arange(10) % VOCABULARY, np.arange(4)]
    masks = [np.arange(10) >= 4, np.zeros(4)]
    result = perplexity(_apply, params, texts, window=6, stride=3, masks=masks)
    terms, _ = _reference(np.asarray(params["words"], np.float64), texts, 6, 3, masks)
    assert result.count == 6
    np.testing.assert_allclose(result.mean, terms.mean(), rtol=1e-6)


def test_compressed_leaves_count_as_what_they_stand_for(params):
    small, _ = jc.quantization.quantize(params, jc.quantization.QuantSpec(bits=3))
    texts = [np.arange(20) % VOCABULARY]
    results = [perplexity(_apply, each, texts, window=8) for each in (small, jc.materialize(small))]
    np.testing.assert_allclose(results[0].mean, results[1].mean, rtol=1e-6)
    assert results[0].mean != perplexity(_apply, params, texts, window=8).mean


def test_one_window_has_no_interval(params):
    result = perplexity(_apply, params, [[1, 2, 3]], window=8)
    assert np.isnan(result.standard_error)
    assert (result.low, result.high) == (0.0, np.inf)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "`window` must be at least 2, got 1"),
        ({"stride": 4}, "`stride` must be between 1 and 3, one less than `window`, got 4"),
        ({"stride": 0}, "`stride` must be between 1 and 3"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"texts": [[1], []]}, "nothing to predict"),
        ({"texts": [[1, 2], [[3, 4]]]}, r"Text 1 must be one-dimensional integers, got int64\[1, 2\]"),
        ({"texts": [[0.5, 2.0]]}, "Text 0 must be one-dimensional integers, got float64"),
        ({"masks": []}, "There are 1 texts and 0 `masks`"),
        ({"masks": [[1, 1]]}, r"Text 0 has 3 tokens, its mask is \[2\]"),
        ({"confidence": 1.0}, r"`confidence` must be in \(0, 1\), got 1.0"),
        ({"params": {"words": jnp.full((VOCABULARY, 6), jnp.nan)}}, "The logits are NaN in text 0"),
    ],
)
def test_errors_say_what_is_wrong(params, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(_apply, **({"params": params, "texts": [[1, 2, 3]], "window": 4} | options))


def test_few_shapes_are_compiled(params):
    traces = []

    def apply(params, ids, mask):
        traces.append(ids.shape)
        return _apply(params, ids, mask)

    perplexity(apply, params, [np.zeros(length, int) for length in range(2, 60)], window=40, batch_size=4)
    assert set(traces) == {(4, 16), (4, 32), (4, 40)}
