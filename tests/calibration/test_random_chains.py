"""Random models that re-arrange a weight: statistics are right, or refused by name (see the example of that name)."""

import importlib.util
from pathlib import Path

import jax
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "random_chains.py"


@pytest.fixture(scope="module")
def chains():
    spec = importlib.util.spec_from_file_location("random_chains", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("start", range(0, 200, 50))
def test_no_random_chain_gives_a_wrong_gram(chains, start):
    with jax.numpy_rank_promotion("allow"):
        results = chains.run(list(range(start, start + 50)))
    assert [result for result in results if result[1].startswith("wrong")] == []
    # Refusing everything would be no answer.
    assert sum(what == "equal" for _, what, _ in results) >= 25
