"""Parameters onto a mesh by rules on their paths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.distillation import shard_by_rules
from jaxcompress.quantization import QuantSpec, quantize

RULES = [(".*up/kernel", P("data", "tensor")), (".*/kernel", P(("data", "tensor"))), (".*/bias", P())]


def _params():
    rng = np.random.default_rng(0)
    sizes = {"up/kernel": (16, 24), "down/kernel": (24, 16), "down/bias": (16,)}
    params = {"layer": {"up": {}, "down": {}}, "scale": jnp.float32(2.0), "key": jax.random.key(1)}
    for path, size in sizes.items():
        layer, name = path.split("/")
        params["layer"][layer][name] = jnp.asarray(rng.normal(size=size), jnp.float32)
    return params


def _mesh(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(kind, kind))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_first_rule_that_matches_counts(kind):
    params, mesh = _params(), _mesh(kind)
    found = shard_by_rules(params, mesh, RULES)
    specs = {"up": P("data", "tensor"), "down": P(("data", "tensor"))}
    for name, spec in specs.items():
        assert found["layer"][name]["kernel"].sharding == NamedSharding(mesh, spec)
        np.testing.assert_array_equal(found["layer"][name]["kernel"], params["layer"][name]["kernel"])
    for leaf in (found["layer"]["down"]["bias"], found["scale"], found["key"]):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.sharding.device_set) == 8


def test_parts_of_compressed_leaves_are_cut_alike():
    params = _params()
    small, _ = quantize(params, QuantSpec(bits=4, group_size=2), select=jc.tree.by_path(".*/kernel"))
    rules = [(".*up/kernel", P("data", "tensor")), (".*", P())]
    found = shard_by_rules(small, _mesh(), rules)["layer"]["up"]["kernel"]
    for part in jax.tree.leaves(found):
        assert part.addressable_shards[0].data.size == part.size // 8
    np.testing.assert_array_equal(found.materialize(), small["layer"]["up"]["kernel"].materialize())
    whole_axis, _ = quantize(params, QuantSpec(bits=4, group_size=8), select=jc.tree.by_path(".*/kernel"))
    with pytest.raises(ValueError, match="cannot") as caught:
        shard_by_rules(whole_axis, _mesh(), rules)
    assert "layer/up/kernel" in "".join(caught.value.__notes__)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (RULES[:1], r"No rule matches the leaves:\n  layer/down/bias\n  layer/down/kernel"),
        ([*RULES, ("head/.*", P())], r"The rule 'head/\.\*' matches no leaf. The leaves are:\n  key"),
        ([(".*", P("model"))], r"the mesh has no axis 'model'; it has \{'data': 4, 'tensor': 2\}"),
        ([(".*", P(None, "data"))], r"for leaf 'layer/down/bias' of shape \(16,\): the spec has 2 axes"),
    ],
)
def test_mistakes_are_named(rules, message):
    with pytest.raises(ValueError, match=message):
        shard_by_rules(_params(), _mesh(), rules)


def test_an_axis_that_does_not_divide_is_named():
    params = _params()
    params["layer"]["up"]["kernel"] = jnp.ones((18, 24))
    with pytest.raises(ValueError, match=r"'layer/up/kernel' of shape \(18, 24\): its axis 0 cannot be cut into 4"):
        shard_by_rules(params, _mesh(), RULES)
