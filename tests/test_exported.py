"""Exported functions: written down, read back, also by a process that has never seen the model."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import optax
import pytest
from transform_table import TABLE, batch, model, params

import jaxcompress as jc
from jaxcompress.calibration import InputStatistics, LookupCounts, input_statistics
from jaxcompress.distillation import TrainState, make_train_step
from jaxcompress.quantization import QuantSpec, lsq, quantize, quantize_inputs
from jaxcompress.trace import LeafLayout
from jaxcompress.tree import Unselected

LAYOUT = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))


def _weights():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6)), jnp.float32)
    leaves = {kind: make(w, LAYOUT) for kind, make in kinds.KINDS.items()}
    inputs = quantize_inputs(quantize({"w": w}, QuantSpec(bits=8))[0], QuantSpec(bits=8))[0]["w"]
    return leaves | {"quantized inputs": inputs}


def _apply(tree, x):
    return {kind: x @ leaf for kind, leaf in tree.items()}


def _round_trip(function, *args):
    exported = jax.export.export(jax.jit(function))(*args)
    found = jax.export.deserialize(exported.serialize())
    assert (found.in_tree, found.out_tree) == (exported.in_tree, exported.out_tree)
    return found


# Without the library there are no nodes to rebuild: a flat list of the stored parts is all that such a caller has.
_FRESH = """
import sys, jax, numpy as np
folder = sys.argv[1]
read = lambda name: jax.export.deserialize(bytearray(open(f"{folder}/{name}", "rb").read()))
data = np.load(f"{folder}/data.npz")
leaves = [data[f"leaf_{i}"] for i in range(len(data.files) - 1)]
bare = read("flat").call(leaves, data["x"])
assert "jaxcompress" not in sys.modules
import jaxcompress
whole = read("whole")
(weights, x), _ = jax.tree.unflatten(whole.in_tree, [*leaves, data["x"]])
np.savez(f"{folder}/out.npz", bare=bare, **whole.call(weights, x))
"""


def test_every_kind_of_array_goes_through_a_file_into_a_fresh_process(tmp_path):
    weights, x = _weights(), jnp.asarray(np.random.default_rng(1).normal(size=(3, 16)), jnp.float32)
    leaves, treedef = jax.tree.flatten(weights)

    def flat(leaves, x):
        return jc.execute(lambda tree, x: x @ tree["int4 groups"])(treedef.unflatten(leaves), x)

    whole = jax.export.export(jax.jit(jc.execute(_apply)))(weights, x)
    (tmp_path / "whole").write_bytes(whole.serialize())
    (tmp_path / "flat").write_bytes(jax.export.export(jax.jit(flat))(leaves, x).serialize())
    np.savez(tmp_path / "data.npz", x=x, **{f"leaf_{i}": leaf for i, leaf in enumerate(leaves)})
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = [sys.executable, "-c", _FRESH, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "out.npz")
    assert set(found.files) == {"bare", *weights}
    for kind, leaf in weights.items():
        wanted = np.asarray(x, np.float64) @ np.asarray(leaf.materialize(), np.float64)
        # Inputs of 8 bits: half a step of 2 / 127 of the largest.
        tolerance = 2e-2 if kind == "quantized inputs" else 1e-5
        np.testing.assert_allclose(found[kind], wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())
    np.testing.assert_array_equal(found["bare"], found["int4 groups"])


@pytest.mark.parametrize("name", TABLE)
def test_states_of_every_transform(name):
    transform = TABLE[name].make()
    state = transform.init(params(), key=jax.random.key(0), statistics=TABLE[name].statistics())
    found = _round_trip(transform.apply, params(), state)
    assert found.in_tree == jax.tree.structure(((params(), state), {}))


def test_the_state_of_a_train_step():
    def squared(student, _, inputs):
        return jnp.square(student["y"] - inputs["y"]).sum(), jnp.float32(inputs["y"].size)

    def apply(tree, inputs, *, key, train):
        return {"y": model(tree, inputs["x"])}

    jax.export.register_namedtuple_serialization(optax.EmptyState, serialized_name="optax.EmptyState")
    transform = lsq(QuantSpec(bits=4))
    options = {"losses": {"squared": squared}, "transform": transform, "transform_optimizer": optax.sgd(1e-3)}
    init_state, step = make_train_step(apply, None, optax.sgd(0.1), **options)
    state = init_state(params(), key=jax.random.key(0))
    step = functools.partial(step, teacher_params=None, batch=batch())
    found, _ = _round_trip(lambda state: step(state), state).call(state)
    assert isinstance(found, TrainState)
    wanted, _ = step(init_state(params(), key=jax.random.key(0)))
    for x, y in zip(jax.tree.leaves(found.params), jax.tree.leaves(wanted.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_statistics_and_the_mark_of_what_is_left_out():
    tree = {"kernel": jnp.ones((4, 3)), "table": jnp.ones((5, 4))}
    names = ("gram", "histogram")
    apply, ids = lambda p, ids: p["table"][ids] @ p["kernel"], jnp.array([1, 2])
    statistics = input_statistics(apply, tree, [(ids,)], statistics=names) | {"bias": Unselected}
    assert {type(leaf) for leaf in statistics.values()} == {InputStatistics, LookupCounts, type(Unselected)}
    found = _round_trip(lambda s: s["kernel"].gram, statistics)
    np.testing.assert_array_equal(found.call(statistics), statistics["kernel"].gram)


class _Unknown:
    """An `InputQuantizer` of somebody else's."""

    codes = rounded = lambda *_: None


def test_a_quantizer_that_cannot_be_written_down_is_named():
    leaf = quantize_inputs({"w": jnp.ones((4, 3))}, QuantSpec(bits=8))[0]["w"]
    leaf = dataclasses.replace(leaf, inputs=_Unknown())
    exported = jax.export.export(jax.jit(lambda leaf: leaf.weight))(leaf)
    with pytest.raises(TypeError, match="InputQuantizedArray cannot be exported"):
        exported.serialize()
