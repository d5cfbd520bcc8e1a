"""Methods that run the model, on trees of which some leaves are compressed already: Flax checks their shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxcompress as jc
from jaxcompress.quantization import QuantSpec, awq, correct_biases, quantize, reconstruct
from jaxcompress.structured import UnitGroup, UnitSlices, refit

SPEC = QuantSpec(bits=4, group_size=4)
BATCHES = [(jax.random.normal(jax.random.key(seed), (16, 8)),) for seed in (0, 1)]
OTHERS = jc.tree.by_path("(first|last)/kernel")


class _Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.Dense(8, name="first")(nn.LayerNorm(name="norm")(x))
        x = x + nn.Dense(8, name="middle")(jnp.tanh(x))
        return nn.Dense(4, name="last")(nn.relu(x))


def _apply(params, x):
    return _Model().apply({"params": params}, x)


def _quantized(params, select):
    return quantize(params, SPEC, select=select)[0]


def _low_rank(params, select):
    return jc.lowrank.svd(params, rank=2, select=select)[0]


def _sparse(params, select):
    kernel = params["middle"]["kernel"]
    return {**params, "middle": {**params["middle"], "kernel": jc.arrays.sparsify(kernel, kernel > 0)}}


@pytest.fixture(params=[_quantized, _low_rank, _sparse])
def partly(request):
    params = _Model().init(jax.random.key(2), *BATCHES[0])["params"]
    return request.param(params, jc.tree.by_path("middle/kernel"))


def _assert_equal(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, jc.materialize(found), jc.materialize(wanted))


def test_reconstruct_leaves_them(partly):
    wanted, known = reconstruct(_apply, jc.materialize(partly), BATCHES, SPEC, select=OTHERS)
    with pytest.warns(jc.trace.LeftOutWarning, match="'middle/kernel': it is compressed already"):
        found, info = reconstruct(_apply, partly, BATCHES, SPEC)
    _assert_equal(found, wanted)
    leaf = partly["middle"]["kernel"]
    assert found["middle"]["kernel"] is leaf
    note = info.pop("middle/kernel")
    assert (note.bits_per_weight, note.note) == (leaf.nbits / 64, "it is compressed already.")
    assert info == known
    with pytest.raises(ValueError, match="Leaf 'middle/kernel' is compressed already; exclude it"):
        reconstruct(_apply, partly, BATCHES, SPEC, select=jc.tree.by_path(".*/kernel"))


def test_biases_are_corrected(partly):
    small = quantize(partly, SPEC, select=OTHERS)[0]
    found, shifts = correct_biases(_apply, partly, small, BATCHES)
    wanted, known = correct_biases(_apply, jc.materialize(partly), small, BATCHES)
    _assert_equal(found, wanted)
    assert shifts == known
    assert found["middle"]["kernel"] is partly["middle"]["kernel"]


def test_others_are_refitted(partly):
    groups = [UnitGroup(name="last", count=8, slices=(UnitSlices(path="last/kernel", axis=0, gated=True),))]
    keep = {"last": np.arange(8) < 5}
    found, info = refit(_apply, partly, groups, keep, BATCHES)
    wanted, known = refit(_apply, jc.materialize(partly), groups, keep, BATCHES)
    _assert_equal(found, wanted)
    assert info == known
    assert found["middle"]["kernel"] is partly["middle"]["kernel"]


def test_awq_rounds_what_they_stand_for(partly):
    folds = jc.trace.folds(_apply, partly, *BATCHES[0])
    assert folds
    found, wanted = (
        awq(tree, jc.calibration.input_statistics(_apply, tree, BATCHES), SPEC, folds=folds)
        for tree in (partly, jc.materialize(partly))
    )
    _assert_equal(found[0], wanted[0])
    assert found[1] == wanted[1]
