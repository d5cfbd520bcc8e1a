"""HQQ against the codes, scales and zero points of the package `hqq`; see golden/make_hqq.py."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.quantization import QuantSpec, hqq

with np.load(Path(__file__).parent / "golden" / "hqq.npz") as _file:
    GOLDEN = dict(_file)
CASES = [tuple(case) for case in json.loads(str(GOLDEN["cases"]))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_to_the_reference(case):
    layer, bits, group = case
    expected = {name: GOLDEN[f"{layer}/{bits}/{group}/{name}"].T for name in ("codes", "scale", "zero")}
    params = {"kernel": jnp.asarray(GOLDEN[f"{layer}/weight"].T)}
    spec = QuantSpec(bits=bits, group_size=group, symmetric=False)
    legacy, _ = hqq(params, spec, iterate="legacy")
    np.testing.assert_array_equal(legacy["kernel"].codes(), expected["codes"])
    np.testing.assert_allclose(legacy["kernel"].scale, expected["scale"], rtol=1e-6)
    np.testing.assert_allclose(legacy["kernel"].zero_point, expected["zero"], rtol=1e-5, atol=1e-5)
    best, _ = hqq(params, spec)
    sizes = [float(jnp.abs(found["kernel"].materialize() - params["kernel"]).mean()) for found in (best, legacy)]
    assert sizes[0] <= sizes[1] * (1 + 1e-6)
