"""Every public function on meshes with Auto and with Explicit axes gives what one device does."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transform_table
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from kinds import KINDS
from mesh_table import CALLS, SPEC, Place

import jaxcompress as jc
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.weights.infos import Info

ALONE, AUTO, EXPLICIT = Place(None), Place(AxisType.Auto), Place(AxisType.Explicit)


def _is_info(node):
    """Infos are nodes without leaves: as a part of the structure their errors would be compared bit for bit."""
    return isinstance(node, Info)


def _figures(tree):
    """Arrays as they are, errors of infos, anything else."""
    return [getattr(leaf, "error", leaf) for leaf in jax.tree.leaves(tree, is_leaf=_is_info)]


@pytest.fixture(scope="module")
def alone():
    """What one device gives, once for each call."""
    known = {}

    def result(name):
        if name not in known:
            known[name] = CALLS[name](ALONE)
        return known[name]

    return result


@pytest.mark.parametrize("place", [EXPLICIT, AUTO], ids=["Explicit", "Auto"])
@pytest.mark.parametrize("name", CALLS)
def test_a_mesh_and_one_device_agree(name, place, alone):
    expected, found = alone(name), CALLS[name](place)
    assert jax.tree.structure(found, is_leaf=_is_info) == jax.tree.structure(expected, is_leaf=_is_info)
    for x, y in zip(_figures(found), _figures(expected), strict=True):
        if isinstance(y, jax.Array | np.ndarray | float):
            np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=2e-4, atol=2e-5)
        elif isinstance(y, str):
            assert x == y
    # What comes back is on the mesh that went in, not on a copy of it with other axes.
    spread: list[Any] = [
        x for x in jax.tree.leaves(found) if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1
    ]
    assert {x.sharding.mesh for x in spread} <= {place.mesh}


@pytest.mark.parametrize("name", ["quantize", "input_statistics", "execute, jit", "correct_biases"])
def test_inside_set_mesh(name, alone):
    place = Place(AxisType.Explicit)
    with jax.set_mesh(place.mesh):
        found = CALLS[name](place)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(alone(name)), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=2e-4, atol=2e-5)


def test_results_inherit_the_sharding_of_their_leaf_and_share_buffers():
    masks = EXPLICIT.masks
    for name in ("fsdp", "tensor", "both"):
        assert masks[name]["kernel"].sharding == EXPLICIT.params[name]["kernel"].sharding
    traced = jax.jit(lambda p: jc.quantization.fake_quantize(p, SPEC))(EXPLICIT.params)
    assert jax.tree.map(lambda x: x.sharding, traced) == jax.tree.map(lambda x: x.sharding, EXPLICIT.params)
    kernel = EXPLICIT.params["both"]["kernel"]
    seen = []
    same = on_auto_axes(lambda x: seen.append(x) or x)(kernel)
    assert same is kernel
    pointers = [x.addressable_shards[0].data.unsafe_buffer_pointer() for x in (seen[0], kernel)]
    assert pointers[0] == pointers[1]
    assert jax.typeof(seen[0]).sharding.spec == P(None, None)


@pytest.mark.parametrize("place", [EXPLICIT, AUTO], ids=["Explicit", "Auto"])
def test_shard_map_is_opaque(place):
    def apply(params, x):
        def block(w, x):
            return jax.lax.psum(x @ w, "model")

        specs = {"in_specs": (P("model", None), P("data", "model")), "out_specs": P("data", None)}
        hidden = jax.shard_map(block, mesh=place.mesh, **specs)(params["inside"], x)
        return hidden @ params["outside"]

    rng = np.random.default_rng(0)
    inside, outside = (jnp.asarray(rng.normal(size=(16, 16)), jnp.float32) for _ in range(2))
    params = {"inside": place.put(inside, P("model", None)), "outside": place.put(outside, P(None, None))}
    x = place.put(jnp.asarray(rng.normal(size=(8, 16)), jnp.float32), P("data", "model"))
    layouts = jc.trace.layouts(apply, params, x)
    assert (layouts["inside"].kind, layouts["inside"].reason) == (
        "other",
        "it goes into `shard_map`, which is not looked into",
    )
    assert layouts["outside"].kind == "matmul"
    statistics = jc.calibration.input_statistics(apply, params, [(x,)], select=jc.tree.by_path("outside"))
    hidden = np.asarray(x, np.float64) @ np.asarray(inside, np.float64)
    np.testing.assert_allclose(statistics["outside"].gram, hidden.T @ hidden, rtol=1e-4, atol=1e-4)
    small, _ = jc.quantization.quantize(params, SPEC)
    plain = {name: np.asarray(jc.materialize(leaf), np.float64) for name, leaf in small.items()}
    expected = np.asarray(x, np.float64) @ plain["inside"] @ plain["outside"]
    np.testing.assert_allclose(jax.jit(jc.execute(apply))(small, x), expected, rtol=1e-4, atol=1e-4)


def test_fisher_information_of_examples_that_devices_share():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    params = {"w": EXPLICIT.put(jnp.ones((3, 2)), P(None, "model"))}
    found = jc.calibration.fisher(lambda p, x: (x @ p["w"]).mean(), params, [EXPLICIT.put(x, P("data", None))])
    wanted = np.square(np.asarray(x, np.float64) / 2).mean(axis=0)[:, None].repeat(2, axis=1)
    np.testing.assert_allclose(found["w"], wanted, rtol=1e-5)


def test_checkpoints_come_back_on_an_explicit_mesh(tmp_path):
    jc.checkpoint.save(tmp_path / "small", EXPLICIT.quantized)
    columns = {0: P(), 1: P("model"), 2: P(None, "model")}
    found, _ = jc.checkpoint.restore(
        tmp_path / "small", sharding=lambda _, leaf: NamedSharding(EXPLICIT.mesh, columns[len(leaf.shape)])
    )
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(EXPLICIT.quantized), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.sharding.mesh == EXPLICIT.mesh
    np.testing.assert_allclose(jc.execute(EXPLICIT.apply)(found, EXPLICIT.x), CALLS["execute"](ALONE), atol=2e-5)


def test_every_kind_of_compressed_array_multiplies_on_an_explicit_mesh():
    rng = np.random.default_rng(3)
    dense = jnp.asarray(rng.normal(size=(32, 16)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(8, 32)), jnp.float32)
    layout = jc.trace.LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
    leaves = {name: KINDS[name](dense, layout) for name in KINDS}
    expected = {
        name: np.asarray(x, np.float64) @ np.asarray(leaf.materialize(), np.float64) for name, leaf in leaves.items()
    }
    rows, columns = NamedSharding(EXPLICIT.mesh, P("data", None)), NamedSharding(EXPLICIT.mesh, P(None, "model"))

    def placed(leaf):
        try:
            return jax.device_put(leaf, jc.arrays.component_shardings(leaf, columns))
        except ValueError:  # Bit masks are cut along rows only.
            return jax.device_put(leaf, NamedSharding(EXPLICIT.mesh, P()))

    def apply(params, x):
        return {name: x @ leaf for name, leaf in params.items()}

    found = jax.jit(jc.execute(apply))({name: placed(leaf) for name, leaf in leaves.items()}, jax.device_put(x, rows))
    for name in KINDS:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", ["movement", "codebooks of 3 bits"])
def test_transforms_train_on_an_explicit_mesh(name, monkeypatch):
    mesh = jax.make_mesh((8,), ("data",))
    split, whole, rows = (NamedSharding(mesh, spec) for spec in (P(None, "data"), P(), P("data")))

    def model(tree, x):
        first, second = (
            jnp.einsum("ni,io->no", x, layer["kernel"], out_sharding=rows) + layer["bias"][None]
            for layer in (tree["first"], tree["second"])
        )
        return jnp.tanh(first) * second

    _, alone, _ = transform_table.trained(name)
    monkeypatch.setattr(transform_table, "model", model)
    transform, spread, traces = transform_table.run(
        transform_table.TABLE[name],
        lambda tree: jax.tree.map(lambda leaf: jax.device_put(leaf, split if leaf.ndim > 1 else whole), tree),
        lambda tree: jax.device_put(tree, rows),
    )
    assert traces == 1
    pairs = [(each.params, each.transform_state) for each in (spread, alone)]
    for x, y in zip(*map(jax.tree.leaves, pairs), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=1e-4, atol=1e-5)
    assert spread.params["first"]["kernel"].sharding == split
    stored = jc.materialize(transform.finalize(spread.params, spread.transform_state))
    expected = jc.materialize(transform.finalize(alone.params, alone.transform_state))
    np.testing.assert_allclose(stored["first"]["kernel"], expected["first"]["kernel"], rtol=1e-4, atol=1e-5)
