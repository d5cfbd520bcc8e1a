"""Checkpoints of a run: every bit of a state, the last and the best, and what is refused."""

import functools
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from kinds import KINDS

import jaxcompress as jc
from jaxcompress.checkpoint import CheckpointError
from jaxcompress.distillation import hard_labels, make_train_step
from jaxcompress.quantization import QuantSpec, lsq
from jaxcompress.training import Checkpoints
from jaxcompress.tree import Unselected

KERNEL = np.arange(128, dtype=np.float32).reshape(16, 8) % 13 - 6
ADAM = optax.adam(0.1)


def apply(params, batch, *, key, train):
    return {"logits": batch["x"] @ params["kernel"] + params["bias"].astype(jnp.float32)[None]}


@functools.cache
def train_state(optimizer=ADAM, *, sharding=None):
    params = {"kernel": jnp.asarray(KERNEL), "bias": jnp.ones(8, jnp.bfloat16)}
    if sharding is not None:
        params = jax.device_put(params, {"kernel": sharding, "bias": NamedSharding(sharding.mesh, P())})
    init_state, _ = make_train_step(
        apply,
        None,
        optimizer,
        losses={"hard": hard_labels()},
        transform=lsq(QuantSpec(bits=4)),
        transform_optimizer=optax.adam(0.01),
    )
    return init_state(params, key=jax.random.key(0))


def everything():
    """Leaves of all kinds and places."""
    kernel = jnp.asarray(KERNEL)
    layout = jc.trace.layouts(lambda p, x: x @ p["kernel"], {"kernel": kernel}, jnp.ones((1, 16)))["kernel"]
    return {
        "train": train_state(),
        "compressed": {kind: make(kernel, layout) for kind, make in KINDS.items()},
        "on a device": jax.device_put(jnp.arange(3.0), jax.devices()[5]),
        "numpy": np.arange(6, dtype=np.int16),
        "scalar": np.float64(0.1),
        "number": 0.1,
        "flag": True,
        "none": None,
        "unselected": Unselected,
        "empty": jnp.zeros((0, 3), jnp.int8),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
        "nan": jnp.asarray([np.nan, -0.0, np.inf], jnp.bfloat16),
    }


def bits(leaf):
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for new, old in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert isinstance(new, jax.Array if isinstance(old, jax.Array) else type(old))
        assert (np.shape(new), getattr(new, "dtype", None)) == (np.shape(old), getattr(old, "dtype", None))
        assert bits(new) == bits(old)
        if isinstance(old, jax.Array):
            assert (new.sharding, new.committed) == (old.sharding, old.committed)
            assert not getattr(new, "weak_type", False)  # keys have none


def test_every_bit_comes_back(tmp_path):
    state = everything()
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(3, state, figures={"loss": 0.1}, progress={"data": [1]})
        restored, info = checkpoints.restore(state)
    assert_same(restored, state)
    assert (info.step, info.figures, info.progress) == (3, {"loss": 0.1}, {"data": [1]})


def test_a_state_goes_to_another_mesh(tmp_path):
    one = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    other = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    state = train_state(sharding=NamedSharding(one, P("fsdp")))
    elsewhere = train_state(sharding=NamedSharding(other, P("data", "model")))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        restored, _ = checkpoints.restore(elsewhere)
    for new, old, like in zip(*map(jax.tree.leaves, (restored, state, elsewhere)), strict=True):
        assert bits(new) == bits(old)
        assert new.sharding == like.sharding


def test_the_order_of_keys_does_not_matter(tmp_path):
    """Steps return dicts with sorted keys, whatever the order at the beginning was."""
    state = {"b": jnp.ones(3), "a": jnp.zeros(3)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, jax.jit(lambda tree: tree)(state))
        restored, _ = checkpoints.restore(state)
    assert_same(restored, state)


def test_a_donated_state_makes_room_for_the_restored_one(tmp_path):
    state = jax.tree.map(jnp.copy, train_state())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        with pytest.raises(CheckpointError):
            checkpoints.restore(state._replace(params={}), donate=True)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        restored, _ = checkpoints.restore(state, donate=True)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert_same(restored, train_state())


def test_the_state_may_be_donated_when_save_returns(tmp_path):
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    state = jnp.zeros((256, 256))
    with Checkpoints(tmp_path, keep_last=10) as checkpoints:
        for number in range(1, 6):
            state = step(state)
            checkpoints.save(number, state)
            state = step(step(state)) - 2
        for number in range(1, 6):
            assert (checkpoints.restore(state, step=number)[0] == number).all()


def test_the_last_and_the_best_are_kept(tmp_path):
    values = [5.0, 1.0, 4.0, float("nan"), 2.0, 3.0, 6.0]
    for mode, best in (("min", [2, 5]), ("max", [1, 7])):
        with Checkpoints(tmp_path / mode, keep_last=1, keep_best=2, metric="error", mode=mode) as checkpoints:
            for number, value in enumerate(values, 1):
                checkpoints.save(number, {"x": jnp.full(3, number)}, figures={"error": value})
            checkpoints.save(8, {"x": jnp.full(3, 8)})
        # Another process, later.
        with Checkpoints(tmp_path / mode, keep_last=1, keep_best=2, metric="error", mode=mode) as checkpoints:
            assert checkpoints.steps() == [*best, 8]
            assert checkpoints.best_step() == (2 if mode == "min" else 7)
            restored, info = checkpoints.restore({"x": jnp.zeros(3, int)}, step=best[0])
        assert (restored["x"] == best[0]).all()
        assert info.figures == {"error": values[best[0] - 1]}
        assert not any((tmp_path / mode / ".removed").iterdir())


def test_without_the_metric_there_is_no_best(tmp_path):
    with Checkpoints(tmp_path, keep_best=1) as checkpoints:
        assert checkpoints.best_step() is None
        checkpoints.save(1, {"x": jnp.ones(2)})
        assert checkpoints.best_step() is None


def test_half_a_checkpoint_is_none(tmp_path):
    state = {"x": jnp.ones(2)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    # What a kill leaves: a step being written, and one being removed.
    half = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", half)
    shutil.rmtree(half / "arrays")
    shutil.copytree(tmp_path / "1", tmp_path / ".removed" / "0")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        checkpoints.save(2, state)
        assert checkpoints.restore(state)[1].step == 2
    assert sorted(os.listdir(tmp_path)) == [".removed", "1", "2"]
    assert os.listdir(tmp_path / ".removed") == []


def test_another_config_is_refused(tmp_path):
    state, config = {"x": jnp.ones(2)}, {"recipe": {"steps": ["prune", {"bits": 4}]}, "rate": 0.1, "seed": 1}
    with Checkpoints(tmp_path, config=config) as checkpoints:
        checkpoints.save(1, state)
    with Checkpoints(tmp_path, config=json.loads(json.dumps(config))) as checkpoints:
        assert checkpoints.restore(state)[1].config == config
    other = {"recipe": {"steps": ["prune", {"bits": 3}, "more"]}, "rate": 0.1, "seed": True}
    with Checkpoints(tmp_path, config=other) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore(state)
    message = str(error.value)
    assert "the checkpoint of step 1" in message
    assert "`recipe.steps.1.bits` is 4 there, and 3 here" in message
    assert "`recipe.steps.2` is nothing there, and 'more' here" in message
    assert "`seed` is 1 there, and True here" in message
    assert "rate" not in message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: train_state(optax.sgd(0.1)), "'optimizer_state/0/mu/bias' is only there"),
        (lambda: train_state(optax.adamw(0.1)), "it has tuple ScaleByAdamState leaf, where this state has EmptyState"),
        (lambda: train_state()._replace(step=jnp.zeros((), jnp.int8)), r"'step' is int32\[\] there, and int8\[\] here"),
        (lambda: train_state()._replace(key=jnp.zeros(2, jnp.uint32)), "'key' is key<fry>.. there, and uint32"),
        (lambda: train_state()._replace(params={}), "'params/kernel' is only there"),
    ],
)
def test_another_state_is_refused(tmp_path, make, message):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, train_state())
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(make())


def test_another_format_of_a_compressed_leaf_is_refused(tmp_path):
    def leaf(bits):
        return jc.quantization.quantize({"kernel": jnp.asarray(KERNEL)}, QuantSpec(bits=bits))[0]

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, leaf(4))
        with pytest.raises(CheckpointError, match=r"'kernel' is float32\[16, 8\] \(QuantizedArray"):
            checkpoints.restore(leaf(8))


def test_a_damaged_checkpoint_is_refused(tmp_path):
    state = {"x": jnp.ones(200)}
    with Checkpoints(tmp_path) as checkpoints:
        for number in (1, 2):
            checkpoints.save(number, state)
        checkpoints.wait()
        manifest = tmp_path / "2" / "manifest" / "metadata"
        content = manifest.read_text()
        for damaged in (content.replace('"x"', '"y"', 1), content[:-9], ""):
            manifest.write_text(damaged)
            with pytest.raises(CheckpointError, match=r"step 2.*Remove '.*2' to go on from the step before it"):
                checkpoints.restore(state)
        manifest.write_text(content)
        shutil.rmtree(tmp_path / "2" / "arrays")
        with pytest.raises(CheckpointError, match=r"step 2.*Remove"):
            checkpoints.restore(state)
        assert_same(checkpoints.restore(state, step=1)[0], state)


def test_mistakes(tmp_path):
    state = {"x": jnp.ones(2)}
    for keywords, message in [
        ({"keep_last": 0}, "`keep_last` must be at least 1"),
        ({"keep_best": -1}, "`keep_best` 0, got 2 and -1"),
        ({"mode": "low"}, "`mode` must be 'min' or 'max', got 'low'"),
        ({"config": {"rate": float("nan")}}, "`config.rate` is nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            Checkpoints(tmp_path, **keywords)
    with pytest.raises(ValueError, match="must be on a file system"):
        Checkpoints("gs://bucket/run")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(FileNotFoundError, match="no checkpoint of step None"):
            checkpoints.restore(state)
        with pytest.raises(TypeError, match="Leaf 'x'"):
            checkpoints.save(1, {"x": object()})
        checkpoints.save(1, state)
        with pytest.raises(ValueError, match="There is a checkpoint of step 1"):
            checkpoints.save(1, state)
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 2 in .*, only of steps \[1\]"):
            checkpoints.restore(state, step=2)
