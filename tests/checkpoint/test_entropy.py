"""Entropy-coded checkpoints: the same bits back, few bytes, and every damage is an error."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcompress._src.checkpoint.read import read_manifest
from jaxcompress._src.report.disk import disk_bytes
from jaxcompress.checkpoint import CheckpointError, restore, save
from jaxcompress.clustering import CodebookSpec, cluster


def sparse_weights(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(np.where(rng.random(shape) < 0.95, 0, rng.normal(size=shape)), jnp.float32)


@pytest.fixture(scope="module")
def model():
    params = {"layer": {"kernel": sparse_weights(120, 90), "bias": jnp.arange(9.0) / 7}}
    return cluster(params, CodebookSpec(values=8))[0]


@pytest.fixture
def path(model, tmp_path):
    save(tmp_path / "c", model, config={"width": 90}, storage="entropy")
    return tmp_path / "c"


def test_everything_comes_back(tmp_path, compressed, assert_same):
    tree = {
        "compressed": compressed,
        "others": {
            "empty": jnp.zeros((0, 3)),
            "scalar": jnp.float32(3),
            "half": jnp.linspace(-3, 3, 50).astype(jnp.bfloat16),
            "numpy": np.random.default_rng(0).normal(size=(5, 7)),
            "bool": jnp.arange(20) % 3 == 0,
            "complex": jnp.array([1 + 2j, np.nan]),
            "special": jnp.array([jnp.nan, -jnp.inf, -0.0, 1e-45]),
            "key": jax.random.key(3),
            "number": 0.1,
            "integers": jnp.arange(-500, 500, dtype=jnp.int32),
        },
    }
    save(tmp_path / "c", tree, storage="entropy")
    assert sorted(os.listdir(tmp_path / "c")) == [read_manifest(tmp_path / "c").arrays, "manifest.z"]
    assert_same(restore(tmp_path / "c")[0], tree)


def test_bytes_are_few_and_info_says_so(path, model):
    kernel = np.asarray(model["layer"]["kernel"].codes())
    shares = np.bincount(kernel.ravel()) / kernel.size
    entropy = -(shares * np.log2(shares)).sum() * kernel.size / 8
    tables = 4 * 7 + 4 * 9
    assert disk_bytes(path) < 1.03 * (entropy + tables) + 250
    params, info = restore(path)
    assert info.disk_bytes == disk_bytes(path)
    assert (info.format_version, info.config, set(info.versions)) == (3, {"width": 90}, {"jaxcompress", "jax"})
    assert read_manifest(path).storage == "entropy"
    del params


def test_every_cut_and_every_changed_byte_is_an_error(path):
    arrays = read_manifest(path).arrays
    for name in (arrays, "manifest.z"):
        whole = (path / name).read_bytes()
        for at in range(0, len(whole), 1 + len(whole) // 12):
            for broken in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :]):
                (path / name).write_bytes(broken)
                with pytest.raises(CheckpointError, match=f"damaged|{arrays}"):
                    restore(path)
        (path / name).write_bytes(whole)
    restore(path)
    (path / arrays).unlink()
    with pytest.raises(CheckpointError, match=f"'{arrays}' is missing"):
        restore(path)


def test_arrays_that_do_not_fit_the_manifest_are_named(path, tmp_path):
    """As if the sums were right, but the coder's bytes were not."""
    from jaxcompress._src.checkpoint.coded import read_coded

    records = read_manifest(path).leaves
    targets = {a.array: np.zeros(a.shape, a.dtype) for record in records for a in record.value.arrays()}
    data = (path / read_manifest(path).arrays).read_bytes()
    for broken, message in ((data[:-3], "'layer/kernel'"), (data + b"x", "1 bytes behind the arrays")):
        (tmp_path / "broken").write_bytes(broken)
        with pytest.raises(CheckpointError, match=message):
            read_coded(str(tmp_path / "broken"), records, targets)


def test_restored_onto_eight_devices(path, model):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    cut = NamedSharding(mesh, PartitionSpec(None, "model"))
    found, _ = restore(path, sharding=lambda name, leaf: cut if name.endswith("kernel") else None)
    assert len(found["layer"]["kernel"].data.data.sharding.device_set) == 2
    np.testing.assert_array_equal(found["layer"]["kernel"].materialize(), model["layer"]["kernel"].materialize())


def test_replaces_only_checkpoints_and_knows_its_storages(path, model, tmp_path):
    with pytest.raises(FileExistsError, match="pass `overwrite=True`"):
        save(path, model, storage="entropy")
    save(path, {"new": 1}, overwrite=True)
    assert restore(path)[0] == {"new": 1}
    save(path, {"newer": 2}, overwrite=True, storage="entropy")
    assert restore(path)[0] == {"newer": 2}
