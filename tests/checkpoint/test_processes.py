"""Two JAX processes of four devices each do what one of eight does: train, save, restore, and fail together."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import several_processes

from jaxcompress.checkpoint import restore
from jaxcompress.training import Checkpoints

SCRIPT = Path(several_processes.__file__)
SECONDS = 240


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes saved."""
    folder, address = tmp_path_factory.mktemp("two"), f"127.0.0.1:{free_port()}"
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), *sys.path])),
    }
    # Files, because a pipe that nobody reads fills and stops its writer.
    logs = [folder / f"log{number}" for number in range(2)]
    processes = []
    try:
        for number, log in enumerate(logs):
            command = [sys.executable, str(SCRIPT), str(number), address, str(folder)]
            with log.open("w") as file:
                processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
        codes = [process.wait(SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return folder


@pytest.mark.parametrize("storage", ["orbax", "entropy"])
def test_the_saved_tree_is_that_of_one_process(folder, assert_same, storage):
    found, info = restore(folder / storage)
    assert info.metadata == {"process": 0}
    assert_same(found, several_processes.mixed(several_processes.mesh()))
    assert len(list((folder / storage).iterdir())) == 2


def test_the_trained_state_is_that_of_one_process(folder):
    expected = several_processes.train(several_processes.mesh())
    found, _ = restore(folder / "state", like=expected)
    check_close(found, expected)


def test_a_run_goes_on_in_one_process_as_in_two(folder, tmp_path):
    """Two processes were stopped, and went on to the end; one restores what they left in the middle and at the end."""
    mesh = several_processes.mesh()
    expected = several_processes.run(mesh, tmp_path / "run", several_processes.batches(mesh), [])
    with Checkpoints(folder / "run", config={"bits": 4}, keep_last=3, keep_best=1) as checkpoints:
        assert checkpoints.steps() == [2, 4, 6]
        check_close(checkpoints.restore(expected)[0], expected)
    shutil.copytree(folder / "run" / "2", tmp_path / "again" / "2")
    with pytest.raises(ValueError, match="the places in the data of 2 processes, and there are 1"):
        several_processes.run(mesh, tmp_path / "again", several_processes.Places(several_processes.batches(mesh)), [])
    # Batches without a place of their own are counted.
    check_close(several_processes.run(mesh, tmp_path / "again", several_processes.batches(mesh), []), expected)


def check_close(found, expected):
    for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        if jax.numpy.issubdtype(new.dtype, jax.dtypes.prng_key):
            new, old = jax.random.key_data(new), jax.random.key_data(old)
        assert (new.shape, new.dtype) == (old.shape, old.dtype), path
        np.testing.assert_allclose(np.asarray(new), np.asarray(old), rtol=1e-5, atol=1e-6, err_msg=str(path))


def test_nothing_is_left_behind(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "damaged",
        "entropy",
        "log0",
        "log1",
        "orbax",
        "run",
        "state",
    ]
