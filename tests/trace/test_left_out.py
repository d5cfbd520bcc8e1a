"""What a default selection leaves out is said, in a table and in one warning."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

import jaxcompress as jc
from jaxcompress import clustering, lowrank, pruning, quantization, trace, tree
from jaxcompress._src.weights.selection import selected_layouts

RNG = np.random.default_rng(0)
PARAMS = {
    "kernel": jnp.asarray(RNG.normal(size=(4, 4)), jnp.float32),
    "squashed": jnp.asarray(RNG.normal(size=(4, 4)), jnp.float32),
    "bias": jnp.ones(4),
    "idle": jnp.ones((2, 2)),
}
X = jnp.ones((3, 4))
SPEC = quantization.QuantSpec(bits=8)


def _apply(params, x):
    return x @ params["kernel"] @ jnp.tanh(params["squashed"]) + params["bias"][None]


LAYOUTS = trace.layouts(_apply, PARAMS, X)

DEFAULTS = {
    "quantize": lambda **kw: quantization.quantize(PARAMS, SPEC, **kw)[0],
    "fake_quantize": lambda **kw: quantization.fake_quantize(PARAMS, SPEC, **kw),
    "hqq": lambda **kw: quantization.hqq(PARAMS, quantization.QuantSpec(bits=8, symmetric=False), **kw),
    "magnitude_scores": lambda **kw: pruning.magnitude_scores(PARAMS, **kw),
    "gradual": lambda **kw: pruning.gradual(schedule=lambda step: 0.5, **kw).init(PARAMS, key=jax.random.key(0)),
    "svd": lambda **kw: lowrank.svd(PARAMS, rank=1, **kw),
    "cluster": lambda **kw: clustering.cluster(PARAMS, clustering.CodebookSpec(values=2), **kw),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_default_selection_warns_once(name):
    with pytest.warns(trace.LeftOutWarning) as caught:
        DEFAULTS[name](layouts=LAYOUTS)
    (warning,) = caught
    assert "leaves out 1 leaf:\n  'squashed': it goes into `tanh`\n" in str(warning.message)
    # What is named is meant.
    DEFAULTS[name](layouts=LAYOUTS, select=tree.by_path("kernel"))


def test_statistics_warn_too():
    with pytest.warns(trace.LeftOutWarning, match=r"of 1 leaf:\n  'squashed': it goes into `tanh`"):
        jc.calibration.input_statistics(_apply, PARAMS, [(X,)])


def test_small_leaves_and_those_of_the_activations_are_no_weights():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm()(x + self.param("positions", nn.initializers.ones, (1, 5, 4)))
            x = nn.MultiHeadDotProductAttention(num_heads=2)(x)
            x = nn.scan(_Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()(x, None)[0]
            return nn.GroupNorm(num_groups=2)(x)

    module, x = Model(), jnp.ones((2, 5, 4))
    params = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    apply = lambda p, y: module.apply({"params": p}, y)  # noqa: E731
    table = trace.coverage(apply, params, x)
    assert table.left_out == ()
    assert {leaf.path.rsplit("/", 1)[-1] for leaf in table.leaves if leaf.selected} == {"kernel"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selected_layouts(params, layouts=trace.layouts(apply, params, x))


class _Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(4)(nn.LayerNorm()(x)), None


def test_the_table_lists_every_leaf():
    table = trace.coverage(_apply, PARAMS, X)
    assert [(leaf.path, leaf.kind, leaf.selected, leaf.doubtful) for leaf in table.leaves] == [
        ("bias", "other", False, False),
        ("idle", "unused", False, False),
        ("kernel", "matmul", True, False),
        ("squashed", "other", False, True),
    ]
    assert sum(leaf.share for leaf in table.leaves) == pytest.approx(1)
    assert table.share == pytest.approx(16 / 40)
    lines = str(table).splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["bias", "idle", "kernel", "squashed"]
    assert "no !" in lines[4]
    assert lines[4].endswith("it goes into `tanh`")
    assert "no output depends on it" in lines[2]


def test_what_nothing_follows_says_so():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    spec = PartitionSpec("data")
    shard = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)

    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    call = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((3, 4), jnp.float32), interpret=True)
    apply = lambda p, x: (shard(x, p["sharded"]), call(x, p["called"]))  # noqa: E731
    params = {"sharded": PARAMS["kernel"], "called": PARAMS["kernel"]}
    table = {leaf.path: leaf for leaf in trace.coverage(apply, params, X).leaves}
    assert table["sharded"].reason == "it goes into `shard_map`, which is not looked into"
    assert table["called"].reason == "it goes into `pallas_call`, which is not looked into"
    with pytest.raises(ValueError, match=r"nothing is selected. Left out are 2 leaves:\n  'called': it goes into"):
        quantization.quantize(params, SPEC, layouts=trace.layouts(apply, params, X))
