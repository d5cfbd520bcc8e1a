"""Wrong names of options, in a process of its own: the type checks of this test session would raise first."""

import subprocess
import sys

CODE = """
import jax.numpy as jnp
import jaxcompress as jc
from jaxcompress._src.quantization.formats.tables import Table
from jaxcompress._src.recipe.recipe import Saving
from jaxcompress._src.solvers.hard_concrete import deterministic_gates

params = {"kernel": jnp.ones((4, 4))}
calls = {
    "scope": lambda: jc.pruning.masks_from_scores(params, sparsity=0.5, scope="layer"),
    "variant": lambda: jc.pruning.gradient_scores(lambda p, x: p["kernel"].sum(), params, [1.0], variant="squared"),
    "store": lambda: jc.pruning.gradual(schedule=jc.schedules.constant(0.5), store="csr"),
    "initial_scales": lambda: jc.quantization.lsq(jc.quantization.QuantSpec(bits=4), initial_scales="zero"),
    "format": lambda: jc.quantization.QuantSpec(bits=4, format=4),
    "levels": lambda: Table(name="list", levels=[0.0, 1.0]),
    "per": lambda: jc.clustering.CodebookSpec(values=4, per="row"),
    "storage": lambda: Saving(storage="zip"),
    "estimator": lambda: deterministic_gates(jnp.ones(3), estimator="mean"),
}
for option, call in calls.items():
    try:
        call()
    except ValueError as err:
        print(err)
"""


def test_wrong_names_list_the_right_ones():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    scope, variant, store, initial_scales, format_, levels, per, storage, estimator = done.stdout.splitlines()
    assert scope == "`scope` must be 'leaf', 'global' or 'row', got 'layer'."
    assert variant == "`variant` must be 'normalized', 'absolute' or 'taylor', got 'squared'."
    assert store == "`store` must be 'sparse' or 'dense', got 'csr'."
    assert initial_scales == "`initial_scales` must be one of ('mean', 'range'), got 'zero'."
    assert format_.startswith("`format` must be one of ('int', 'ternary', ")
    assert format_.endswith("or a `NumberFormat`, got 4.")
    assert levels == "The levels of a table are a tuple, which can be hashed, got [0.0, 1.0]."
    assert per == "`per` must be 'leaf' or 'output', got 'row'."
    assert storage == "`storage` must be 'orbax' or 'entropy', got 'zip'."
    assert estimator == "`estimator` must be 'louizos' or 'topk', got 'mean'."
