"""What `checkpoint/test_processes.py` does in one process and in two; run as a script, it is one of the two."""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress._src.arrays.packed import pack
from jaxcompress.arrays import QuantizedArray, component_shardings
from jaxcompress.checkpoint import restore, save
from jaxcompress.training import Checkpoints, fit


def mesh() -> Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def spread(array: Any, sharding: Any) -> jax.Array:
    """An array of all processes, from the whole of it in each."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def weights(mesh: Mesh) -> dict[str, Any]:
    """Small numbers, so that sums are exact in whatever order."""
    kernel = np.arange(128, dtype=np.float32).reshape(16, 8) % 13 - 6
    return {
        "kernel": spread(kernel, NamedSharding(mesh, P("data", "model"))),
        "bias": spread(np.arange(8, dtype=np.float32), NamedSharding(mesh, P())),
    }


def mixed(mesh: Mesh) -> dict[str, Any]:
    """Leaves of every kind and placement: sharded, replicated, of one device, of NumPy, compressed, empty, keys."""
    codes = jnp.asarray(np.arange(256).reshape(32, 8) % 15 - 7, jnp.int8)
    leaf = QuantizedArray(data=pack(codes, bits=4, axis=0), scale=jnp.ones((4, 8)) / 4, dtype=jnp.dtype("float32"))
    shardings = component_shardings(leaf, NamedSharding(mesh, P("data", "model")))
    key = jax.random.key(3)
    return weights(mesh) | {
        "quantized": jax.tree.map(spread, leaf, shardings),
        "local": jnp.arange(5.0),
        "numpy": np.arange(6, dtype=np.int16),
        "number": 0.5,
        "empty": jnp.zeros((0, 3)),
        "local key": key,
        "key": jax.random.wrap_key_data(spread(jax.random.key_data(key), NamedSharding(mesh, P()))),
    }


def apply(params: Any, batch: Any, *, key: Any, train: bool) -> dict[str, jax.Array]:
    return {"logits": batch["x"] @ params["kernel"] + params["bias"][None]}


def begin(mesh: Mesh, seed: int = 0) -> tuple[Any, Any]:
    """The first state of a distillation with learned quantization inside, and `(state, batch) -> (state, metrics)`."""
    params = weights(mesh)
    init_state, step = jc.distillation.make_train_step(
        apply,
        apply,
        optax.adam(0.125),
        losses={"soft": jc.distillation.soft_targets()},
        transform=jc.quantization.lsq(jc.quantization.QuantSpec(bits=4)),
        transform_optimizer=optax.sgd(1e-3),
    )
    return init_state(params, key=jax.random.key(seed)), lambda state, batch: step(state, params, batch)


def batches(mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    while True:
        yield {"x": spread(np.eye(16, dtype=np.float32), NamedSharding(mesh, P("data")))}


class Places:
    """Batches that tell their place, as iterators of Grain do; in each process another."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches, self.at, self.begun = batches, 100 * jax.process_index(), None

    def __iter__(self) -> "Places":
        return self

    def __next__(self) -> Any:
        self.at += 1
        return next(self._batches)

    def get_state(self) -> dict[str, int]:
        return {"at": self.at}

    def set_state(self, state: dict[str, int]) -> None:
        self.at = self.begun = state["at"]


def train(mesh: Mesh, seed: int = 0) -> Any:
    """The state after a step."""
    state, step = begin(mesh, seed)
    return step(state, next(batches(mesh)))[0]


def run(mesh: Mesh, path: Path, batches: Iterator[Any], figures: list[Any]) -> Any:
    """The state after six steps, begun at the last checkpoint."""
    state, step = begin(mesh)
    with Checkpoints(path, config={"bits": 4}, keep_last=3, keep_best=1) as checkpoints:
        return fit(
            state,
            step,
            batches,
            steps=6,
            checkpoints=checkpoints,
            save_every=2,
            log_every=2,
            sinks=[lambda *line: figures.append(line)],
        )[0]


def check_run(mesh: Mesh, path: Path) -> None:
    """One process gets SIGTERM, and both stop after the same step; what is left is done by another run."""
    number, figures = jax.process_index(), []

    def stopped() -> Iterator[Any]:
        for at, batch in enumerate(batches(mesh)):
            if at == 2 and number == 1:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    with fails(SystemExit, str(128 + signal.SIGTERM)):
        run(mesh, path, Places(stopped()), figures)
    # What one process got in its third step, both know after the fourth.
    assert sorted(int(step.name) for step in path.iterdir() if step.name.isdigit()) == [2, 4]
    places = Places(batches(mesh))
    run(mesh, path, places, figures)
    assert (places.begun, places.at) == (100 * number + 4, 100 * number + 6)
    # The first process writes figures.
    assert [step for step, _ in figures] == ([] if number else [2, 4, 6])
    with Checkpoints(path, config={"bits": 3}) as checkpoints, fails(ValueError, "`bits` is 4 there, and 3 here"):
        checkpoints.restore(begin(mesh)[0])


def main(number: int, address: str, folder: Path) -> None:
    jax.distributed.initialize(address, 2, number, local_device_ids=range(4), initialization_timeout=60)
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 8, 4)
    grid = mesh()
    tree = mixed(grid)
    for storage in ("orbax", "entropy"):
        save(folder / storage, {"old": 1})
        # Of the first process; the tree must be the same everywhere.
        save(folder / storage, tree, metadata={"process": number}, overwrite=True, storage=storage)
        check_restored(folder / storage, grid, tree)
    save(folder / "state", train(grid))
    check_run(grid, folder / "run")
    check_tables(grid)
    check_errors(folder, grid)


def check_tables(mesh: Mesh) -> None:
    """Values shared by the weights of a leaf that no process has whole."""
    kernel = weights(mesh)["kernel"]
    transform = jc.clustering.trained_codebooks(jc.clustering.CodebookSpec(values=3))
    many = transform.init({"kernel": kernel}, key=jax.random.key(0))
    one = transform.init({"kernel": jnp.asarray(whole(kernel))}, key=jax.random.key(0))
    for x, y in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(whole(x), y)


def check_restored(path: Path, mesh: Mesh, tree: Any) -> None:
    def place(name: str, _: Any) -> Any:
        return NamedSharding(mesh, P("data", "model")) if name in ("kernel", "quantized") else None

    found, info = restore(path, sharding=place)
    assert info.metadata == {"process": 0}
    assert not found["kernel"].is_fully_addressable
    assert not found["quantized"].data.data.is_fully_addressable
    assert found["bias"].devices() == {jax.local_devices()[0]}
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for new, old in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
        assert getattr(new, "dtype", None) == getattr(old, "dtype", None)
        np.testing.assert_array_equal(whole(new), whole(old))


def whole(leaf: Any) -> np.ndarray:
    from jax.experimental import multihost_utils

    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    local = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
    return np.asarray(leaf if local else multihost_utils.process_allgather(leaf, tiled=True))


def check_errors(folder: Path, mesh: Mesh) -> None:
    """An error in one process is an error in both, and nobody waits for the other."""
    number = jax.process_index()
    with fails(FileExistsError, "pass `overwrite=True`"):
        save(folder / "state", {"a": 1})
    with fails(ValueError, "Leaf 'a/1' is an array of each JAX process"):
        save(folder / "other", {"a": [np.zeros(2), np.full(2, number)]})
    with fails(ValueError, "other leaves, shapes or numbers"):
        save(folder / "other", {"a": number})
    with fails(TypeError, "Leaf 'a'"):
        save(folder / "other", {"a": object() if number else 1})
    with fails(ValueError, "give all of them the same `key`"):
        train(mesh, seed=number)
    with fails(FileNotFoundError, "There is no checkpoint"):
        restore(folder / "nothing")
    with fails(ValueError, "no entry for leaf 'bias'"):
        restore(folder / "orbax", sharding={"kernel": None} if number else None)
    jax.experimental.multihost_utils.sync_global_devices("damage")
    if number == 0:
        shutil.copytree(folder / "entropy", folder / "damaged")
        damaged = next((folder / "damaged").glob("arrays-*.bin"))
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    jax.experimental.multihost_utils.sync_global_devices("damaged")
    with fails(jc.checkpoint.CheckpointError, "SHA-256"):
        restore(folder / "damaged")


@contextlib.contextmanager
def fails(error: type[BaseException], message: str) -> Iterator[None]:
    try:
        yield
    except error as err:
        if message not in str(err):
            raise
    else:
        raise AssertionError(f"no {error.__name__}: {message}")


if __name__ == "__main__":
    os.environ["JAX_NUM_CPU_DEVICES"] = "4"
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
