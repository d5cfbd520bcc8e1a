"""The arithmetic of the hard concrete distribution: against Captum's, and against derivations written here."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress._src.solvers.hard_concrete import (
    HardConcrete,
    cumulative,
    deterministic_gates,
    initial_log_alpha,
    nonzero_probability,
    quantile,
    sample_gates,
    soft_gates,
)

DISTRIBUTIONS = {
    "standard": HardConcrete(),
    "others": HardConcrete(beta=0.33, gamma=-0.3, zeta=1.05),
}
GRID = np.linspace(-6.0, 6.0, 25)


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(Path(__file__).parent / "golden" / "hard_concrete.npz"))


def _f32(x):
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_captum_agrees(golden, name):
    distribution, log_alpha = DISTRIBUTIONS[name], _f32(golden["log_alpha"])
    noise = _f32(golden[f"{name}/noise"])
    sampled = quantile(noise, jnp.broadcast_to(log_alpha, noise.shape), distribution=distribution)
    # Of noise close to 1, float32 keeps few digits of 1 - u.
    np.testing.assert_allclose(sampled, golden[f"{name}/sampled"], atol=1e-5)
    # Zeros and ones are the same ones, but where float32 rounds across the border.
    for value in (0, 1):
        differ = (np.asarray(sampled) == value) != (golden[f"{name}/sampled"] == value)
        assert differ.sum() <= 1
    probability = nonzero_probability(log_alpha, distribution=distribution)
    np.testing.assert_allclose(probability, golden[f"{name}/nonzero_probability"], rtol=1e-6)
    np.testing.assert_allclose(probability.sum(), golden[f"{name}/expected_l0"], rtol=1e-6)
    found = deterministic_gates(log_alpha, estimator="louizos", distribution=distribution)
    np.testing.assert_allclose(found, golden[f"{name}/deterministic"], atol=1e-6)


def _reference_quantile(u, log_alpha, d):
    s = 1 / (1 + np.exp(-(np.log(u) - np.log(1 - u) + log_alpha) / d.beta))
    return np.clip(s * (d.zeta - d.gamma) + d.gamma, 0, 1)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_probabilities_are_integrals_over_the_noise(name):
    """Midpoint quadrature of the indicators z(u) != 0 and z(u) <= x, in float64."""
    d, points = DISTRIBUTIONS[name], 40_000
    u = (np.arange(points) + 0.5) / points
    z = _reference_quantile(u[:, None], GRID[None], d)
    np.testing.assert_allclose(nonzero_probability(_f32(GRID), distribution=d), (z > 0).mean(axis=0), atol=3 / points)
    for x in (-0.2, 0.0, 0.1, 0.5, 0.99, 1.0, 1.3):
        found = cumulative(jnp.full(GRID.shape, x, jnp.float32), _f32(GRID), distribution=d)
        np.testing.assert_allclose(found, (z <= x).mean(axis=0), atol=3 / points)


def test_the_quantile_inverts_the_distribution_between_its_atoms():
    log_alpha = _f32(np.linspace(-2, 2, 9))
    for u in (0.3, 0.5, 0.7):
        z = quantile(jnp.full(9, u, jnp.float32), log_alpha)
        back = cumulative(z, log_alpha)
        inside = (z > 0) & (z < 1)
        assert inside.sum() >= 3
        np.testing.assert_allclose(back[inside], u, rtol=1e-4)


def test_samples_have_the_probabilities_and_a_gradient():
    log_alpha = _f32([-3.0, -1.0, 0.0, 2.0])
    many = jnp.broadcast_to(log_alpha, (20_000, 4))
    z = np.asarray(sample_gates(jax.random.key(0), many))
    assert z.min() == 0
    assert z.max() == 1
    # Five standard errors of a share.
    for share, expected in (
        ((z > 0).mean(axis=0), nonzero_probability(log_alpha)),
        ((z < 1).mean(axis=0), cumulative(jnp.full(4, 1 - 1e-7), log_alpha)),
    ):
        np.testing.assert_allclose(share, expected, atol=5 * 0.5 / np.sqrt(20_000))
    gradient = jax.grad(lambda x: sample_gates(jax.random.key(1), jnp.broadcast_to(x, (2000, 4))).mean())(log_alpha)
    assert (gradient > 0).all()


def test_noise_at_its_ends_gives_finite_gates_and_gradients():
    for u in (0.0, 1.0):
        value, gradient = jax.value_and_grad(lambda x, u=u: quantile(jnp.float32(u), x))(jnp.float32(0.0))
        assert value == u
        assert np.isfinite(gradient)
    assert np.isfinite(nonzero_probability(_f32([-1e4, 1e4]))).all()
    np.testing.assert_allclose(nonzero_probability(_f32([-1e4, 1e4])), [1e-6, 1 - 1e-6], rtol=1e-5)


def _reference_topk(log_alpha, beta=2 / 3):
    """Written after the description of CoFi's rule: as many zeros as expected, the rest soft."""
    log_alpha = np.asarray(log_alpha, np.float64)
    chance = 1 / (1 + np.exp(-(log_alpha - beta * np.log(0.1 / 1.1))))
    zeros = int(np.round(np.sum(1 - chance)))
    values = 1 / (1 + np.exp(-0.8 * log_alpha / beta))
    # The lowest first; among equal ones the last index.
    order = sorted(range(len(values)), key=lambda i: (log_alpha[i], -i))
    values[order[:zeros]] = 0
    return values


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ties", [False, True])
def test_topk_against_its_description(seed, ties):
    log_alpha = np.random.default_rng(seed).normal(scale=3, size=37).astype(np.float32)
    if ties:
        log_alpha = np.round(log_alpha)
    found = jax.jit(lambda x: deterministic_gates(x, estimator="topk"))(_f32(log_alpha))
    np.testing.assert_allclose(found, _reference_topk(log_alpha), rtol=1e-5)


def test_topk_of_equal_single_and_extreme_gates():
    equal = deterministic_gates(jnp.full(10, -1.5986), estimator="topk")
    assert (np.asarray(equal) > 0).tolist() == [True] * 5 + [False] * 5
    assert deterministic_gates(_f32([-4.0]), estimator="topk").tolist() == [0.0]
    assert deterministic_gates(_f32([1.0]), estimator="topk")[0] > 0
    assert (deterministic_gates(jnp.full(7, 30.0), estimator="topk") > 0).all()
    assert (deterministic_gates(jnp.full(7, -30.0), estimator="topk") == 0).all()
    assert (soft_gates(jnp.full(7, -10.0), estimator="topk") > 0).all()


def test_louizos_closes_below_the_logit_of_one_twelfth():
    border = np.log((1 / 12) / (11 / 12))
    found = deterministic_gates(
        _f32([border - 1e-3, border + 1e-3, -border - 1e-3, -border + 1e-3]), estimator="louizos"
    )
    assert found[0] == 0 < found[1] < 0.01
    assert 0.99 < found[2] < 1 == found[3]


def test_initial_locations():
    for rate in (0.2, 0.5, 0.9):
        found = np.asarray(initial_log_alpha(jax.random.key(0), (4000,), rate))
        assert found.dtype == np.float32
        assert found.mean() == pytest.approx(np.log((1 - rate) / rate), abs=1e-3)
        assert found.std() == pytest.approx(0.01, rel=0.1)
    with pytest.raises(ValueError, match=r"must be in \(0, 1\), got 1"):
        initial_log_alpha(jax.random.key(0), (1,), 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.0}, "`gamma` must be negative, got 0"),
        ({"zeta": 1.0}, "`zeta` must be greater than 1"),
        ({"beta": 0.0}, "`beta` must be positive"),
        ({"epsilon": 0.5}, "`epsilon` must be in"),
    ],
)
def test_impossible_constants_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        HardConcrete(**options)
