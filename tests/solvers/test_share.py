"""Shares of counts, against exact rational arithmetic."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress._src.solvers.share import share_of


def _cases():
    rng = np.random.default_rng(0)
    sizes = np.concatenate([rng.integers(0, 2**31, 3000), rng.integers(0, 100, 2000), [2**31 - 1] * 5, [0]])
    shares = np.concatenate(
        [rng.random(3000), rng.integers(0, 17, 2000) / 16, [1, 0.5, 2**-31, 2**-32, 1 - 2**-24], [0.3]]
    )
    shares[:1500] *= 2.0 ** -rng.integers(0, 40, 1500)
    return sizes, shares.astype(np.float32)


@pytest.mark.parametrize(("rounding", "exact"), [("nearest", round), ("down", int)])
def test_exact_for_every_float(rounding, exact):
    sizes, shares = _cases()
    found = jax.jit(share_of, static_argnames="rounding")(
        jnp.asarray(sizes, jnp.int32), jnp.asarray(shares), rounding=rounding
    )
    wanted = [exact(Fraction(int(n)) * Fraction(float(s))) for n, s in zip(sizes, shares, strict=True)]
    np.testing.assert_array_equal(found, wanted)


def test_where_float32_is_off():
    """Its product has 24 bits: 2^30 + 3 weights at half would lose one."""
    size = 2**30 + 6
    assert int(share_of(jnp.array([size]), jnp.array([0.5]))[0]) == size // 2
    assert int(jnp.round(jnp.float32(size) * 0.5)) != size // 2
