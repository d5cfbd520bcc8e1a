"""Containers: which are rebuilt from the path alone, which need `like`, and that keys never mix."""

import collections
import dataclasses
import json
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

from jaxcompress._src.checkpoint.manifest_file import checksum
from jaxcompress._src.checkpoint.read import read_manifest
from jaxcompress._src.types import TransformState
from jaxcompress.checkpoint import CheckpointError, restore, save
from jaxcompress.tree import Unselected


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class Unnamed:
    """Registered without keys: JAX numbers its children."""

    child: Any

    def tree_flatten(self):
        return (self.child,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)])
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


COLLIDING = [
    {"a.b": 1, "a": {"b": 2}},
    {"a/b": 1, "a": {"b": 2}},
    {"1": 1, 1: {"0": 2, 0: 3}},
    {"": 1, "x": {"": 2}},
    {"ä\n\"'\\": 1, "\x00": 2, "\ud800": 3},
    {"manifest.json": 1, "..": 2, "leaf_00000": 3, "leaf_00000.data": 4},
]


@pytest.mark.parametrize("shape", COLLIDING)
def test_keys_never_mix(tmp_path, shape):
    params = (
        jax.tree.map(lambda x: np.full(2, x), shape) if 1 not in shape else {1: {0: np.full(2, 3)}, "1": np.ones(2)}
    )
    save(tmp_path / "c", params)
    found, _ = restore(tmp_path / "c")
    assert json.dumps(found, default=np.ndarray.tolist) == json.dumps(params, default=np.ndarray.tolist)
    assert [list(map(type, tree)) for tree in (found,)] == [list(map(type, params))]


def test_plain_containers_are_rebuilt_exactly(tmp_path, assert_same):
    params = {
        "z": [jnp.ones(1), (jnp.zeros(2), None, Unselected)],
        "a": {10: jnp.ones(1), 9: {}},
        "frozen": FrozenDict(b={"c": jnp.ones(1)}, a=()),
        "ordered": collections.OrderedDict(b=1, a=2),
        "state": TransformState(trainable={"logits": jnp.ones(2)}, fixed={"mask": jnp.array([True]), "step": 3}),
    }
    save(tmp_path / "c", params)
    found, _ = restore(tmp_path / "c")
    assert_same(found, params)
    assert list(found) == list(params)
    assert list(found["a"]) == [10, 9]
    assert found["z"][1][2] is Unselected


def test_nnx_state_is_rebuilt_with_its_variables_and_metadata(tmp_path, assert_same):
    _, state = nnx.split(Network(nnx.Rngs(0)))
    state["extra"] = nnx.Param(jnp.ones((2, 3)), eager_sharding=False, out_sharding=("a", None), scale=0.5)
    save(tmp_path / "c", state)
    found, _ = restore(tmp_path / "c")
    assert type(found) is nnx.State
    assert_same(found, state)
    assert found["extra"].get_metadata() == state["extra"].get_metadata()
    assert type(found["norm"]["mean"]) is nnx.BatchStat
    assert type(found["layers"][0]["kernel"]) is nnx.Param


def test_nnx_variables_hold_compressed_leaves(tmp_path, assert_same, compressed):
    state = nnx.State({"layer": {"kernel": nnx.Param(compressed["int4 groups"])}})
    save(tmp_path / "c", state)
    assert_same(restore(tmp_path / "c")[0], state)
    assert [leaf.name for leaf in read_manifest(tmp_path / "c").leaves] == ["layer/kernel"]


def test_nnx_metadata_that_json_cannot_hold_need_like(tmp_path, assert_same):
    state = nnx.State({"kernel": nnx.Param(jnp.ones(2), init=jnp.zeros)})
    save(tmp_path / "c", state)
    with pytest.raises(CheckpointError, match=r"'kernel' is a flax\.nnx\.variablelib\.Param.*`like=`"):
        restore(tmp_path / "c")
    assert_same(restore(tmp_path / "c", like=state)[0], state)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Pair(jnp.ones(2), [jnp.zeros(3)]),
        lambda: {"deep": (Pair(jnp.ones(2), None),)},
        lambda: Unnamed(jnp.arange(3)),
        lambda: eqx.nn.Linear(2, 3, key=jax.random.key(0)),
        lambda: optax.adamw(1e-3).init({"w": jnp.ones(2)}),
        lambda: Network(nnx.Rngs(0)),
    ],
)
def test_other_containers_need_like(tmp_path, assert_same, make):
    save(tmp_path / "c", make())
    with pytest.raises(CheckpointError, match=r"never imported because a file names it.*`like=`"):
        restore(tmp_path / "c")
    abstract = jax.eval_shape(make)
    for like in (make(), abstract):
        assert_same(restore(tmp_path / "c", like=like)[0], make())


def test_like_turns_one_container_into_another(tmp_path, assert_same, compressed):
    params = {"b": {"kernel": compressed["int4 groups"]}, "a": jnp.ones(2)}
    save(tmp_path / "c", params)
    plain = {"a": jnp.ones(2), "b": {"kernel": jax.ShapeDtypeStruct((16, 8), jnp.float32)}}
    assert_same(restore(tmp_path / "c", like=FrozenDict(plain))[0], FrozenDict(params))


def test_like_that_does_not_fit(tmp_path):
    save(tmp_path / "c", {"a": jnp.ones(2), "b": jnp.ones((2, 3)), "key": jax.random.key(0)})
    good = {"a": jnp.ones(2), "b": jnp.ones((2, 3)), "key": jax.random.key(1)}
    restore(tmp_path / "c", like=good)
    with pytest.raises(CheckpointError, match=r"not stored: d; and lacks stored leaves: b, key"):
        restore(tmp_path / "c", like={"a": jnp.ones(2), "d": jnp.ones(2)})
    with pytest.raises(CheckpointError, match=r"leaf 'b' is float32\[2, 3\]; in `like` it is float32\[3, 2\]"):
        restore(tmp_path / "c", like=good | {"b": jnp.ones((3, 2))})
    with pytest.raises(CheckpointError, match=r"leaf 'a' is float32\[2\]; in `like` it is bfloat16\[2\]"):
        restore(tmp_path / "c", like=good | {"a": jnp.ones(2, jnp.bfloat16)})
    with pytest.raises(CheckpointError, match=r"leaf 'key' is key<fry>\[\]; in `like` it is key<rbg>\[\]"):
        restore(tmp_path / "c", like=good | {"key": jax.random.key(1, impl="rbg")})
    with pytest.raises(CheckpointError, match="lacks stored leaves: a"):
        restore(tmp_path / "c", like={"a": {"x": 1}, "b": 1, "key": 1})
    with pytest.raises(CheckpointError, match="not stored: 0"):
        restore(tmp_path / "c", like=[1])


def test_a_file_never_makes_us_import_a_class(tmp_path, monkeypatch):
    save(tmp_path / "c", Pair(jnp.ones(2), 1))
    manifest = tmp_path / "c" / "manifest.json"
    for kind in ("os.system", "nnx.Module", "nnx.os", "nnx.__class__", "builtins.eval"):
        content = json.loads(manifest.read_text())
        content["structure"] |= {"kind": kind, "opaque": False}
        manifest.write_text(json.dumps(content | {"checksum": checksum(content)}))
        with pytest.raises(CheckpointError, match=f"unknown kind '{kind}'"):
            restore(tmp_path / "c")
