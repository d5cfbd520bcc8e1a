"""Restoring onto devices: another number than at the save, shardings by leaf, parts of compressed leaves."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxcompress._src.arrays.packed import pack
from jaxcompress.arrays import QuantizedArray
from jaxcompress.checkpoint import restore, save

ROWS, WHOLE = P("x"), P()


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


@pytest.fixture
def params(compressed):
    # Sixteen times as many rows, so that eight devices hold whole groups and bytes.
    tall = jax.tree.map(lambda part: jnp.repeat(part, 8, axis=0) if part.shape[0] > 1 else part, compressed["int8"])
    return {"plain": jnp.arange(16.0).reshape(8, 2), "tall": tall, "key": jax.random.split(jax.random.key(0), 8)}


def _specs(leaf):
    return [part.sharding.spec for part in jax.tree.leaves(leaf)]


def test_default_is_one_device_whatever_the_save(tmp_path, assert_same, mesh, params):
    spread = jax.device_put(params["plain"], NamedSharding(mesh, ROWS))
    save(tmp_path / "c", {"plain": spread})
    found, _ = restore(tmp_path / "c")
    assert found["plain"].devices() == {jax.devices()[0]}
    assert_same(found, {"plain": params["plain"]})
    with jax.default_device(jax.devices()[3]):
        assert restore(tmp_path / "c")[0]["plain"].devices() == {jax.devices()[3]}


@pytest.mark.parametrize("how", ["single", "function", "tree", "prefix", "parts"])
def test_every_way_to_ask_for_shardings(tmp_path, assert_same, mesh, params, how):
    save(tmp_path / "c", params)
    rows = NamedSharding(mesh, ROWS)
    asked = {
        "single": rows,
        "function": lambda path, leaf: NamedSharding(mesh, P("x", *[None] * (len(leaf.shape) - 1))),
        "tree": {"plain": rows, "tall": rows, "key": rows},
        "prefix": {"plain": rows, "tall": rows, "key": rows},
        "parts": {"plain": rows, "tall": jax.tree.map(lambda _: rows, params["tall"]), "key": rows},
    }[how]
    if how == "parts":
        replicated = NamedSharding(mesh, WHOLE)
        asked["tall"] = type(params["tall"])(**{**vars(asked["tall"]), "scale": replicated})
    if how == "prefix":
        params, asked = {"model": params}, {"model": rows}
        save(tmp_path / "c", params, overwrite=True)
    found, _ = restore(tmp_path / "c", sharding=asked)
    assert_same(found, params)
    leaves = found["model"] if how == "prefix" else found
    assert leaves["plain"].sharding.is_equivalent_to(rows, 2)
    assert leaves["key"].sharding.is_equivalent_to(rows, 1)
    assert leaves["tall"].data.sharding.is_equivalent_to(rows, 2)
    # A scale of size 1 along the rows cannot be cut: it is on every device.
    assert leaves["tall"].scale.sharding.is_fully_replicated
    assert len(leaves["tall"].scale.devices()) == 8


def test_none_in_a_tree_and_other_shardings(tmp_path, mesh, params):
    save(tmp_path / "c", params | {"number": 3, "none": None, "numpy": np.ones(2)})
    last = SingleDeviceSharding(jax.devices()[7])
    found, _ = restore(tmp_path / "c", sharding={"plain": None, "tall": last, "key": last, "numpy": None})
    assert found["plain"].devices() == {jax.devices()[0]}
    assert {device for part in jax.tree.leaves(found["tall"]) for device in part.devices()} == {jax.devices()[7]}
    assert (found["number"], found["none"], type(found["numpy"])) == (3, None, np.ndarray)


def test_numpy_leaves_go_to_devices_when_asked(tmp_path, mesh):
    save(tmp_path / "c", {"a": np.arange(8, dtype=np.int32), "empty": np.ones((0, 2), np.float32)})
    found, _ = restore(tmp_path / "c", sharding=NamedSharding(mesh, ROWS))
    assert isinstance(found["a"], jax.Array)
    assert isinstance(found["empty"], jax.Array)
    assert len(found["a"].devices()) == 8
    np.testing.assert_array_equal(found["a"], np.arange(8))
    save(tmp_path / "wide", {"a": np.arange(8.0)})
    with pytest.raises(ValueError, match=r"leaf 'a' is float64.*jax_enable_x64"):
        restore(tmp_path / "wide", sharding=NamedSharding(mesh, ROWS))


def test_shardings_that_do_not_fit_name_the_leaf(tmp_path, mesh, compressed):
    save(tmp_path / "c", {"dense": {"kernel": compressed["int4 2:4"]}, "odd": jnp.ones(3)})
    rows, column = NamedSharding(mesh, ROWS), NamedSharding(mesh, P(None, "x"))
    with pytest.raises(ValueError, match=r"Leaf 'dense/kernel' cannot be sharded as asked: Axis -2 .* whole blocks"):
        restore(tmp_path / "c", sharding={"dense": rows, "odd": None})
    with pytest.raises(ValueError, match=r"Leaf 'odd' cannot be sharded as asked: .*shape \(3,\)"):
        restore(tmp_path / "c", sharding={"dense": None, "odd": rows})
    with pytest.raises(ValueError, match=r"Leaf 'odd' cannot be sharded as asked: .*more axes"):
        restore(tmp_path / "c", sharding=column)
    with pytest.raises(ValueError, match="no entry for leaf 'odd'"):
        restore(tmp_path / "c", sharding={"dense": None})
    with pytest.raises(ValueError, match="an entry at 'old', where no leaf is stored"):
        restore(tmp_path / "c", sharding={"dense": None, "odd": None, "old": rows})
    with pytest.raises(ValueError, match=r"Leaf 'odd' .* a jax\.Array needs a jax\.sharding\.Sharding, got P"):
        restore(tmp_path / "c", sharding=lambda path, leaf: P() if path == "odd" else None)


def test_sharding_tree_made_from_the_live_tree(tmp_path, assert_same, mesh, params):
    placed = jax.device_put(params, NamedSharding(mesh, WHOLE))
    save(tmp_path / "c", placed)
    found, _ = restore(tmp_path / "c", sharding=jax.tree.map(lambda part: part.sharding, placed))
    assert_same(found, params)
    assert _specs(found) == _specs(placed)


def test_between_eight_devices_and_one(tmp_path, assert_same, mesh):
    """Saved here on eight, restored and saved again by a process that has one, restored here on eight."""
    codes = jnp.asarray(np.arange(128 * 8).reshape(128, 8) % 15 - 7, jnp.int8)
    leaf = QuantizedArray(data=pack(codes, bits=4, axis=0), scale=jnp.ones((32, 8)) / 3, dtype=jnp.dtype("float32"))
    params, rows = {"leaf": leaf, "plain": jnp.arange(16.0)}, NamedSharding(mesh, ROWS)
    save(tmp_path / "eight", jax.tree.map(lambda part: jax.device_put(part, rows), params))
    script = """
import sys, jax
from jaxcompress._src.arrays.packed import pack
from jaxcompress.arrays import QuantizedArray
from jaxcompress.checkpoint import restore, save
params, _ = restore(sys.argv[1])
assert all(part.devices() == set(jax.devices()) for part in jax.tree.leaves(params))
save(sys.argv[2], params)
print(len(jax.devices()), "device")
"""
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1",
        "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), *sys.path])),
    }
    command = [sys.executable, "-W", "error", "-c", script, str(tmp_path / "eight"), str(tmp_path / "one")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1 device\n"), done.stderr
    for sharding, devices in ((rows, 8), (None, 1)):
        found, _ = restore(tmp_path / "one", sharding=sharding)
        assert_same(found, params)
        assert {len(part.devices()) for part in jax.tree.leaves(found)} == {devices}
