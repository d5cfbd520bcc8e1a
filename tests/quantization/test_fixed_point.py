"""Fixed point against Python's integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress._src.arrays.validate import validate_array
from jaxcompress._src.quantization.formats.fixed_point import fixed_point_decode, fixed_point_encode
from jaxcompress.arrays import sparsify
from jaxcompress.quantization import fixed_point
from jaxcompress.trace import LeafLayout


@pytest.mark.parametrize("bits", range(1, 9))
def test_encode_is_the_formula(bits):
    x = np.concatenate([np.linspace(-3, 3, 1001), [0.5, -0.5, 1e6, -1e6, 0.0, -0.0]]).astype(np.float32)
    wanted = [round(float(value) * 2**bits) % 2**bits for value in x]
    np.testing.assert_array_equal(fixed_point_encode(jnp.asarray(x), bits), wanted)


@pytest.mark.parametrize("bits", range(1, 9))
def test_decode_undoes_encode_within_the_range(bits):
    half_step = 2.0 ** -(bits + 1)
    x = np.linspace(-0.5, 0.5 - half_step, 999, endpoint=False).astype(np.float32)
    for overflow in ("wrap", "saturate"):
        back = fixed_point_decode(fixed_point_encode(jnp.asarray(x), bits, overflow=overflow), bits)
        assert np.abs(back - x).max() <= half_step
    # Every value there is comes back as itself.
    q = jnp.arange(2**bits, dtype=jnp.uint8)
    np.testing.assert_array_equal(fixed_point_encode(fixed_point_decode(q, bits), bits), q)


@pytest.mark.parametrize("bits", range(1, 9))
def test_overflow(bits):
    top = 0.5 - 2.0**-bits
    x = jnp.array([0.5, 0.75, -0.75, 7.0, -7.0])
    saturated = fixed_point_decode(fixed_point_encode(x, bits, overflow="saturate"), bits)
    np.testing.assert_array_equal(saturated, [top, top, -0.5, top, -0.5])
    wrapped = fixed_point_decode(fixed_point_encode(x, bits), bits)
    assert float(wrapped[0]) == -0.5
    assert ((wrapped >= -0.5) & (wrapped < 0.5)).all()


@pytest.mark.parametrize("bits", [1, 4])
def test_trees(bits):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 5)) * 0.2, jnp.float32).at[:, 3].set(0.0)
    layouts = {"kernel": LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,))}
    for leaf in (w, sparsify(w, w != 0, stack_ndim=1)):
        made = fixed_point({"kernel": leaf}, bits, layouts=layouts)[0]["kernel"]
        validate_array(made)
        wanted = fixed_point_decode(fixed_point_encode(w, bits, overflow="saturate"), bits)
        plain = jax.jit(lambda leaf: leaf.materialize())
        np.testing.assert_array_equal(plain(made), wanted)
        assert (wanted[:, 3] == 0).all()
        assert made.scale.shape == (2, 1, 1)
        np.testing.assert_array_equal(plain(jax.tree.map(lambda part: np.asarray(part)[1], made)), wanted[1])


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"`bits` must be .* got 9"):
        fixed_point_encode(jnp.ones(2), 9)
    with pytest.raises(ValueError, match=r"`bits` must be .* got 0"):
        fixed_point({"kernel": jnp.ones((2, 2))}, 0)
    with pytest.raises((ValueError, TypeError), match=r"(?s)overflow.*'clip'"):
        fixed_point_encode(jnp.ones(2), 4, overflow="clip")
