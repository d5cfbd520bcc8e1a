"""SparseGPT, Wanda and n:m against llm-compressor's results; see golden/make_one_shot.py."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import pruning
from jaxcompress.calibration import input_statistics

with np.load(Path(__file__).parent / "golden" / "one_shot.npz") as _file:
    GOLDEN = dict(_file)
CASES = [tuple(case) for case in json.loads(str(GOLDEN["cases"]))]


def _statistics(layer, kernel):
    x = jnp.asarray(GOLDEN[f"{layer}/inputs"])
    return input_statistics(
        lambda p, x: x @ p["kernel"], {"kernel": kernel}, [(x,)], statistics=("gram", "squared_sum")
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_to_the_reference(case):
    layer, method, sparsity, n, m, block = case
    kernel = jnp.asarray(GOLDEN[f"{layer}/weight"].T)
    expected = GOLDEN[f"{layer}/{method}/{sparsity}/{n}:{m}/{block}/pruned"].T
    # The reference's n is the number that goes.
    options = {"pattern": pruning.n_of_m(m - n, m)} if n else {"sparsity": sparsity}
    if method == "sparsegpt":
        options |= {"block_size": block}
    pruned, info = getattr(pruning, method)(
        {"kernel": kernel}, _statistics(layer, kernel), counting=method, unseen="zero", **options
    )
    found = np.asarray(pruned["kernel"])
    np.testing.assert_array_equal(found == 0, expected == 0)
    np.testing.assert_allclose(found, expected, rtol=1e-3 if layer == "singular" else 1e-4, atol=1e-4)
    if method == "wanda":
        np.testing.assert_array_equal(found, expected)
    assert info["kernel"].unseen_inputs == (3 if layer == "singular" else 0)


def test_the_references_count_differs_from_ours_as_documented():
    kernel = jnp.asarray(GOLDEN["wide/weight"].T)
    statistics, weights = _statistics("wide", kernel), kernel.size
    for count, zeros in (("exact", weights // 2), ("sparsegpt", weights // 2 + 3)):
        pruned, _ = pruning.sparsegpt({"kernel": kernel}, statistics, sparsity=0.5, block_size=16, counting=count)
        # Blocks of 16, 16 and 8 inputs lose one weight more each.
        assert int((pruned["kernel"] == 0).sum()) == zeros
