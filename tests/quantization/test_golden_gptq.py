"""GPTQ against the weights that llm-compressor and AutoGPTQ find; see golden/make_gptq.py."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimized import OPTIONS

from jaxcompress._src.quantization import gptq as _gptq
from jaxcompress.calibration import input_statistics
from jaxcompress.quantization import QuantSpec, RangeSearch, gptq

with np.load(Path(__file__).parent / "golden" / "gptq.npz") as _file:
    GOLDEN = dict(_file)
CASES = [tuple(case) for case in json.loads(str(GOLDEN["cases"]))]


# One weight lies on a tie within the precision of float32, which falls the reference's way in an optimized program.
_SOLVE = jax.jit(_gptq._solve.__wrapped__, static_argnames=("zero_unseen", "rule", "groups"), compiler_options=OPTIONS)


@pytest.fixture(autouse=True)
def _optimized(monkeypatch):
    monkeypatch.setattr(_gptq, "_solve", _SOLVE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_to_the_reference(case):
    layer, _, bits, group, symmetric, order, groups, mse, block = case
    expected = GOLDEN["/".join(map(str, case))].T
    params = {"kernel": jnp.asarray(GOLDEN[f"{layer}/weight"].T)}
    rows = jnp.asarray(GOLDEN[f"{layer}/inputs"])
    statistics = input_statistics(lambda p, x: x @ p["kernel"], params, [(rows,)], statistics=("gram",))
    found, info = gptq(
        params,
        statistics,
        QuantSpec(bits=bits, group_size=group, symmetric=symmetric, convention="full"),
        order=order,
        group_scales=groups,
        range_search=RangeSearch(grid_size=80, shrink=0.8, norm=2.4) if mse else None,
        refine=0,
        block_size=block,
        unseen="zero",
    )
    step = np.repeat(np.asarray(found["kernel"].scale), len(expected) // found["kernel"].scale.shape[0], axis=0)
    # The same codes everywhere, not one step apart anywhere; scales may differ in the last place.
    np.testing.assert_allclose(found["kernel"].materialize(), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(found["kernel"].materialize()) - expected).max() < 1e-4 * step.min()
    assert info["kernel"].unseen_inputs == (2 if layer == "wide" else 0)
