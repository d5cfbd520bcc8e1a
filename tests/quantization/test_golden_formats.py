"""Codes, scales, gradients and clips of named public implementations: see `golden/make_formats.py`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress._src.quantization.entropy import entropy_clip
from jaxcompress._src.quantization.learned import learned_quantize_array
from jaxcompress._src.quantization.round_to_nearest import quantize_array
from jaxcompress.quantization import QuantSpec
from jaxcompress.trace import LeafLayout

GOLDEN = np.load(Path(__file__).parent / "golden" / "formats.npz")
# As torch has it: (out, in).
LAYOUT = LeafLayout(kind="matmul", input_axes=(1,), output_axes=(0,))
LSQ = {
    "2": QuantSpec(bits=2, convention="full", per_tensor=True),
    "3": QuantSpec(bits=3, convention="full", per_tensor=True),
    "8": QuantSpec(bits=8, convention="full", per_tensor=True),
    "2u": QuantSpec(bits=2, symmetric=False, per_tensor=True),
    "4u": QuantSpec(bits=4, symmetric=False, per_tensor=True),
}


def test_nf4_of_bitsandbytes():
    leaf = quantize_array(jnp.asarray(GOLDEN["w"]), QuantSpec(format="nf4", group_size=64), LAYOUT)
    np.testing.assert_array_equal(leaf.codes(), GOLDEN["nf4/codes"])
    np.testing.assert_array_equal(leaf.scale, GOLDEN["nf4/scale"])
    np.testing.assert_allclose(leaf.materialize(), GOLDEN["nf4/values"], rtol=1e-6)


@pytest.mark.parametrize("format", ["mxfp4", "mxfp8_e4m3", "mxfp8_e5m2"])
def test_mx_of_torchao(format):
    leaf = quantize_array(jnp.asarray(GOLDEN["w"]), QuantSpec(format=format), LAYOUT)
    np.testing.assert_array_equal(np.asarray(leaf.scale).view(np.uint8), GOLDEN[f"{format}/scale"])
    codes, wanted = np.asarray(leaf.codes()), GOLDEN[f"{format}/codes"]
    # Theirs keeps the sign of values that round to 0; so does ours.
    np.testing.assert_array_equal(codes, wanted)


@pytest.mark.parametrize("name", LSQ)
def test_lsq_of_nni(name):
    """The paper's gradients, with N the weights of the tensor."""
    spec = LSQ[name]
    w, scale = jnp.asarray(GOLDEN["w"]), jnp.asarray(GOLDEN[f"lsq/{name}/scale"]).reshape(1, 1)
    zero = None if spec.symmetric else jnp.zeros((1, 1))
    cotangent = jnp.sin(jnp.arange(w.size, dtype=jnp.float32)).reshape(w.shape)
    rounded, pull = jax.vjp(lambda w, scale: learned_quantize_array(w, scale, zero, spec), w, scale)
    by_w, by_scale = pull(cotangent)
    np.testing.assert_allclose(rounded, GOLDEN[f"lsq/{name}/values"], rtol=1e-6)
    np.testing.assert_allclose(by_w, GOLDEN[f"lsq/{name}/by_w"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by_scale[0], GOLDEN[f"lsq/{name}/by_scale"], rtol=1e-4)


@pytest.mark.parametrize("kind", ["8", "8u", "4"])
@pytest.mark.parametrize("name", ["normal", "heavy", "relu"])
def test_entropy_of_modelopt(name, kind):
    levels = 2 ** (int(kind[0]) - 1 + ("u" in kind))
    assert entropy_clip(GOLDEN[f"entropy/{name}/counts"], levels=levels) == GOLDEN[f"entropy/{name}/{kind}"]
