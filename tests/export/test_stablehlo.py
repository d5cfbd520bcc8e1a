"""Programs that JAX loads without this library, and without Flax."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.export import load_stablehlo, save_stablehlo
from jaxcompress.quantization import QuantSpec, quantize, quantize_inputs
from jaxcompress.trace import LeafLayout

LAYOUT = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
RNG = np.random.default_rng(0)
WIDE = jnp.asarray(RNG.normal(size=(64, 6)), jnp.float32)


def _every_kind():
    leaves = {kind: make(WIDE, LAYOUT) for kind, make in kinds.KINDS.items()}
    rounded = quantize_inputs(quantize({"w": WIDE}, QuantSpec(bits=8))[0], QuantSpec(bits=8))[0]["w"]
    extra = {
        "bf16": WIDE.astype(jnp.bfloat16),
        "e8m0 scales": quantize({"w": WIDE}, QuantSpec(format="mxfp4"))[0]["w"],
        "inputs": rounded,
        "int4": jnp.ones((64, 6), jnp.int4),
    }
    return leaves | extra


def _apply(tree, x):
    return {kind: x.astype(jnp.float32) @ leaf.astype(jnp.float32) for kind, leaf in tree.items()}


# The lines of the docstring of `save_stablehlo`.
_FRESH = """
import sys, jax, pathlib
import numpy as np
from safetensors.numpy import load_file

directory = pathlib.Path(sys.argv[1])
exported = jax.export.deserialize(bytearray((directory / "model.stablehlo").read_bytes()))
arrays = load_file(directory / "params.safetensors")
outputs = jax.jit(exported.call)(arrays, np.load(sys.argv[2]))
assert not {"jaxcompress", "flax"} & set(sys.modules)
np.savez(sys.argv[3], **outputs)
"""


def test_every_kind_runs_bit_by_bit_in_a_process_that_has_never_seen_the_library(tmp_path):
    tree, x = _every_kind(), jnp.asarray(RNG.normal(size=(3, 64)), jnp.float32)
    info = save_stablehlo(tmp_path / "model", _apply, tree, x)
    assert set(info.leaves) == {kind for kind, leaf in tree.items() if hasattr(leaf, "materialize")}
    assert info.leaves["int4 groups"] == jc.report.describe_leaf(tree["int4 groups"])
    assert info.nbytes == sum(path.stat().st_size for path in (tmp_path / "model").iterdir())
    np.save(tmp_path / "x.npy", x)
    run = [sys.executable, "-c", _FRESH, *(str(tmp_path / name) for name in ("model", "x.npy", "out.npz"))]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    wanted = jax.jit(jc.execute(_apply, kernels=()))(tree, x)
    with np.load(tmp_path / "out.npz") as outputs:
        for kind in tree:
            np.testing.assert_array_equal(outputs[kind], wanted[kind], err_msg=kind)


def test_one_program_takes_every_batch_and_says_what_it_is(tmp_path):
    tree = {"w": quantize({"w": jnp.asarray(RNG.normal(size=(512, 512)), jnp.float32)}, QuantSpec(bits=4))[0]["w"]}
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 512"), jnp.float32)
    info = save_stablehlo(tmp_path / "model", lambda p, x: {"y": x @ p["w"]}, tree, shape, platforms=("cpu", "tpu"))
    assert info.platforms == ("cpu", "tpu")
    described = json.loads((tmp_path / "model" / "export.json").read_text())
    assert described["inputs"] == ["float32[batch,512]"]
    assert described["outputs"] == ["float32[batch,512]"]
    assert described["calling_convention_version"] == info.calling_convention
    assert described["compressed_leaves"] == {"w": "int4 per-channel"}
    run = load_stablehlo(tmp_path / "model")
    for batch in (1, 20):
        x = jnp.asarray(RNG.normal(size=(batch, 512)), jnp.float32)
        wanted = np.asarray(x, np.float64) @ np.asarray(tree["w"].materialize(), np.float64)
        np.testing.assert_allclose(run(x)["y"], wanted, rtol=1e-4, atol=1e-3)


def test_parameters_whose_paths_read_the_same_stay_apart(tmp_path):
    tree = {"a": {"b": jnp.ones(2)}, "a/b": jnp.zeros(2), "flag": True}
    save_stablehlo(tmp_path / "model", lambda p, x: x + p["a"]["b"] if p["flag"] else p["a/b"], tree, jnp.ones(2))
    run = load_stablehlo(tmp_path / "model")
    assert len(run.args[0]) == 2
    np.testing.assert_array_equal(run(jnp.ones(2)), [2.0, 2.0])


def test_not_even_the_names_that_set_them_apart_read_the_same(tmp_path):
    tree = {"a": {"b": jnp.ones(2), "b~2": 2 * jnp.ones(2)}, "a/b": 3 * jnp.ones(2)}
    save_stablehlo(tmp_path / "model", lambda p: (p["a"]["b"], p["a"]["b~2"], p["a/b"]), tree)
    np.testing.assert_array_equal(load_stablehlo(tmp_path / "model")(), [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])


def test_links_stay_and_the_working_directory_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for overwrite in (False, True):
        save_stablehlo(tmp_path / "link", lambda p, x: p["w"] * x, {"w": jnp.ones(2)}, jnp.ones(2), overwrite=overwrite)
    assert (tmp_path / "link").is_symlink()
    np.testing.assert_array_equal(load_stablehlo(tmp_path / "real")(jnp.ones(2)), [1.0, 1.0])
    monkeypatch.chdir(tmp_path / "real")
    with pytest.raises(FileExistsError, match="working directory"):
        save_stablehlo(".", lambda p, x: x, {}, jnp.ones(2), overwrite=True)


def test_what_exists_stays_unless_asked_and_what_fails_leaves_nothing(tmp_path):
    target, tree, x = tmp_path / "model", {"w": jnp.ones(2)}, jnp.ones(2)
    save_stablehlo(target, lambda p, x: p["w"] * x, tree, x)
    with pytest.raises(FileExistsError, match="overwrite"):
        save_stablehlo(target, lambda p, x: p["w"] + x, tree, x)
    with pytest.raises(ZeroDivisionError):
        save_stablehlo(target, lambda p, x: 1 / 0, tree, x, overwrite=True)
    np.testing.assert_array_equal(load_stablehlo(target)(2 * x), [2.0, 2.0])
    save_stablehlo(target, lambda p, x: p["w"] + x, tree, x, overwrite=True)
    np.testing.assert_array_equal(load_stablehlo(target)(2 * x), [3.0, 3.0])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(TypeError, match="Input 1 is True, not an array"):
        save_stablehlo(tmp_path / "model", lambda p, x, flag: x, {}, jnp.ones(2), True)
    with pytest.raises(TypeError, match="'key' is a random key"):
        save_stablehlo(tmp_path / "model", lambda p, x: x, {"key": jax.random.key(0)}, jnp.ones(2))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.stablehlo", "params.safetensors", "export.json"])
def test_damaged_files_are_named(tmp_path, name):
    save_stablehlo(tmp_path / "model", lambda p, x: x @ p["w"], {"w": jnp.eye(3)}, jnp.ones((2, 3)), platforms=("cpu",))
    path = tmp_path / "model" / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=f"{name}' is damaged"):
        load_stablehlo(tmp_path / "model")
    path.unlink()
    with pytest.raises(OSError, match=name):
        load_stablehlo(tmp_path / "model")
