"""Statistics of two models on the same examples, against independent arithmetic."""

import fractions
import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress.report import agreement, kl_divergence, paired_difference

RESULTS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60)


def _exact_p(only_a, only_b):
    """The definition: outcomes at least as uneven, of all equally probable ones."""
    count = only_a + only_b
    if count == 0:
        return 1.0
    extreme = sum(
        1 for bits in itertools.product((0, 1), repeat=count) if abs(2 * sum(bits) - count) >= abs(only_a - only_b)
    )
    return float(fractions.Fraction(extreme, 2**count))


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (3, 3), (5, 1), (2, 9), (0, 12), (6, 7)])
def test_mcnemar_counts_outcomes(only_a, only_b):
    a = [1] * only_a + [0] * only_b + [1, 1, 0]
    b = [0] * only_a + [1] * only_b + [1, 1, 0]
    found = paired_difference(a, b)
    assert (found.only_a, found.only_b, found.count) == (only_a, only_b, only_a + only_b + 3)
    assert found.p_value == pytest.approx(_exact_p(only_a, only_b), rel=1e-14)


@given(results=RESULTS)
def test_difference_interval_and_symmetry(results):
    a, b = np.array(results).T
    found, other = paired_difference(a, b), paired_difference(b, a)
    difference = a.astype(float) - b
    assert found.difference == pytest.approx(a.mean() - b.mean(), abs=1e-12)
    assert found.standard_error == pytest.approx(np.sqrt(difference.var(ddof=1) / len(a)), abs=1e-12)
    assert found.high - found.difference == pytest.approx(1.959963984540054 * found.standard_error, abs=1e-12)
    assert (other.difference, other.low, other.high) == (-found.difference, -found.high, -found.low)
    assert 0.0 < found.p_value == other.p_value <= 1.0


def test_pairing_is_what_makes_the_interval_narrow():
    rng = np.random.default_rng(0)
    hard = rng.random(2000) < 0.3
    a = ~hard
    b = np.where(rng.random(2000) < 0.01, hard, a)
    unpaired = math.sqrt(a.var(ddof=1) / 2000 + b.var(ddof=1) / 2000)
    assert paired_difference(a, b).standard_error < 0.2 * unpaired


def test_many_examples_neither_overflow_nor_vanish():
    count = 20_000
    a, b = np.zeros(count, bool), np.zeros(count, bool)
    a[: count // 2 + 100], b[count // 2 + 100 :] = True, True
    # The normal approximation with continuity correction is good to a few percent here.
    z = (200 - 1) / math.sqrt(count)
    assert paired_difference(a, b).p_value == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    tiny = paired_difference(np.ones(1000), np.zeros(1000)).p_value
    assert tiny == 2.0**-999


def test_wider_confidence_is_a_wider_interval():
    a, b = [1, 1, 0, 1, 0], [1, 0, 0, 1, 1]
    widths = [(found := paired_difference(a, b, confidence=level)).high - found.low for level in (0.5, 0.9, 0.99)]
    assert widths == sorted(widths)
    assert len(set(widths)) == 3


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1], [1], "same 2 or more examples, got 1 and 1"),
        ([1, 0], [1, 0, 1], "got 2 and 3"),
        ([[1, 0]], [1, 0], r"`correct_a` must have one entry .* shape \(1, 2\)"),
        ([1, 0], [1, 0.5], "`correct_b` must hold 0 and 1"),
        ([1, math.nan], [1, 0], "`correct_a` must hold 0 and 1"),
        (["yes", "no"], [1, 0], "`correct_a` must hold 0 and 1"),
    ],
)
def test_paired_difference_refuses(a, b, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(a, b)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0, math.nan])
def test_confidence_out_of_range(confidence):
    for fn in (paired_difference, agreement):
        with pytest.raises(ValueError, match=r"`confidence` must be in \(0, 1\)"):
            fn([1, 0], [1, 1], confidence=confidence)


@given(matches=st.integers(0, 40), others=st.integers(0, 40), confidence=st.floats(0.01, 0.999))
def test_wilson_ends_solve_its_equation(matches, others, confidence):
    """The ends are the rates p with (rate - p)² = z² p (1 - p) / n."""
    count = matches + others
    if count == 0:
        return
    found = agreement(
        np.arange(count), np.where(np.arange(count) < matches, np.arange(count), -1), confidence=confidence
    )
    assert (found.matches, found.count, found.rate) == (matches, count, matches / count)
    assert 0.0 <= found.low <= found.rate <= found.high <= 1.0
    slope = paired_difference([1, 0], [0, 0], confidence=confidence)
    z = (slope.high - slope.difference) / slope.standard_error
    for end in (found.low, found.high):
        assert (found.rate - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / count, abs=1e-9)


def test_agreement_extremes():
    assert agreement([1, 2], [1, 2]).high == 1.0
    assert agreement([1, 2], [1, 2]).low > 0.3
    assert agreement([1, 2], [2, 1]).low == 0.0
    assert agreement(["a", "b"], ["a", "c"]).rate == 0.5
    assert agreement([math.nan], [math.nan]).rate == 0.0
    with pytest.raises(ValueError, match="same 1 or more examples, got 0 and 0"):
        agreement([], [])
    with pytest.raises(ValueError, match=r"`b` must have one entry .* shape \(\)"):
        agreement([1], np.ones(()))


LOGITS = st.lists(st.lists(st.floats(-50, 50), min_size=3, max_size=3), min_size=2, max_size=6)


@settings(deadline=None)
@given(p=LOGITS, shift=st.floats(-1e3, 1e3), seed=st.integers(0, 99))
def test_divergence_laws(p, shift, seed):
    p = np.array(p)
    q = p + np.random.default_rng(seed).normal(size=p.shape)
    found = kl_divergence(p, q)
    wide = (
        np.exp(p.astype(np.longdouble) - p.max(-1, keepdims=True)),
        np.exp(q.astype(np.longdouble) - q.max(-1, keepdims=True)),
    )
    left, right = (part / part.sum(-1, keepdims=True) for part in wide)
    expected = (left * (np.log(left) - np.log(right))).sum(-1).astype(float)
    np.testing.assert_allclose(found.per_example, expected, rtol=1e-9, atol=1e-13)
    assert (found.per_example >= 0).all()
    assert found.per_example.dtype == np.float64
    np.testing.assert_allclose(kl_divergence(p + shift, q).per_example, found.per_example, rtol=1e-6, atol=1e-9)
    assert (kl_divergence(p, p).per_example == 0).all()
    assert 0 <= found.low <= found.mean <= found.high
    assert found.standard_error == pytest.approx(found.per_example.std(ddof=1) / math.sqrt(len(p)))


def test_divergence_of_excluded_classes():
    inf = math.inf
    found = kl_divergence([[0.0, -inf], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(found.per_example, [math.log(2), 0.0])
    unbounded = kl_divergence([[0.0, 0.0], [0.0, 0.0]], [[0.0, -inf], [0.0, 0.0]])
    assert (unbounded.per_example[0], unbounded.mean, unbounded.low, unbounded.high) == (inf, inf, 0.0, inf)


def test_divergence_reads_jax_arrays_of_few_bits():
    p, q = jnp.asarray([[1.0, 2.0], [3.0, 1.0]], jnp.bfloat16), jnp.asarray([[1.0, 2.5], [3.0, 1.0]], jnp.float32)
    assert kl_divergence(p, q).per_example[1] == 0.0
    assert kl_divergence(p, q).per_example[0] > 0.0


@pytest.mark.parametrize(
    ("p", "q", "message"),
    [
        ([[1.0, 2.0]], [[1.0, 2.0]], r"`p_logits` must be .* at least 2 examples, got shape \(1, 2\)"),
        ([1.0, 2.0], [1.0, 2.0], r"shape \(2,\)"),
        (np.zeros((2, 0)), np.zeros((2, 0)), r"shape \(2, 0\)"),
        (np.zeros((2, 3)), np.zeros((2, 4)), r"same shape, got \(2, 3\) and \(2, 4\)"),
        (
            [[0.0, 1.0], [math.nan, 1.0]],
            np.zeros((2, 2)),
            "`p_logits` has no distribution at 1 examples, the first is 1",
        ),
        (np.zeros((2, 2)), np.full((2, 2), -math.inf), "`q_logits` has no distribution at 2 examples, the first is 0"),
        (np.zeros((2, 2)), [[0.0, math.inf], [0.0, 0.0]], "`q_logits` has no distribution"),
    ],
)
def test_divergence_refuses(p, q, message):
    with pytest.raises(ValueError, match=message):
        kl_divergence(p, q)
