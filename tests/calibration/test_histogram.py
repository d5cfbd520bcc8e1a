"""Histograms whose range grows: exactly those of all values at once."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.calibration.histogram import BINS, Histogram, add_histograms, empty_histogram, histogram_of
from jaxcompress.calibration import input_statistics


def reference(values, weights=None):
    largest = np.abs(values).max()
    limit = 2.0 ** (np.floor(np.log2(largest)) + 1)
    place = np.floor((values / limit + 1) * BINS / 2).astype(int)
    return np.bincount(place, weights, minlength=BINS), limit


def test_parts_add_up_to_the_whole():
    rng = np.random.default_rng(0)
    parts = [(rng.normal(size=500) * scale).astype(np.float32) for scale in (1e-3, 40.0, 1.0)]
    total = empty_histogram(())
    for part in parts:
        total = jax.jit(lambda total, part: add_histograms(total, histogram_of(part, None)))(total, jnp.asarray(part))
    values = np.concatenate(parts).astype(np.float64)
    counts, limit = reference(values)
    np.testing.assert_array_equal(total.counts, counts)
    assert float(total.limit) == limit
    np.testing.assert_array_equal([total.lowest, total.highest], np.float32([values.min(), values.max()]))


def test_stacks_weights_and_zeros():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 50)).astype(np.float32) * np.array([[1.0], [8.0]], np.float32)
    weights = rng.integers(0, 3, 50).astype(np.float32)
    x[:, weights == 0] = np.nan
    found = histogram_of(jnp.asarray(x), jnp.asarray(weights))
    for i in range(2):
        kept = weights > 0
        counts, limit = reference(x[i, kept].astype(np.float64), weights[kept])
        np.testing.assert_array_equal(found.counts[i], counts)
        assert float(found.limit[i]) == limit
    blank = histogram_of(jnp.zeros(7), None)
    assert float(blank.counts[BINS // 2]) == 7
    np.testing.assert_array_equal(add_histograms(blank, empty_histogram(())).counts, blank.counts)


def test_gathered_of_a_model():
    """Through a scan, with a mask, next to the sums; other statistics stay as they are."""
    w = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4, 4)), jnp.float32) / 2
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 5, 4)), jnp.float32)
    mask = jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])

    def apply(params, x, mask):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    found = input_statistics(
        apply, {"w": w}, [(x, mask)] * 2, statistics=("absolute_max", "histogram"), row_mask=lambda x, mask: mask
    )["w"]
    assert isinstance(found.histogram, Histogram)
    for i in range(3):
        rows = np.asarray(x)[np.asarray(mask) > 0]
        counts, limit = reference(np.float64(rows).ravel())
        if i == 0:
            np.testing.assert_array_equal(found.histogram.counts[i], 2 * counts)
            assert float(found.histogram.limit[i]) == limit
        assert float(found.histogram.counts[i].sum()) == 2 * 8 * 4
        np.testing.assert_allclose(
            np.maximum(found.histogram.highest[i], -found.histogram.lowest[i]), found.absolute_max[i].max(), rtol=1e-6
        )
        x = jnp.tanh(x @ w[i])
