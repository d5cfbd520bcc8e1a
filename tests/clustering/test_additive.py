"""Leaves as sums of entries of several tables: against NumPy, in every layout, and with everything wrong with them."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress._src.arrays.validate import validate_array
from jaxcompress.arrays import AdditiveCodebookArray, sparsify
from jaxcompress.clustering import AdditiveSpec, CodebookSpec, additive_quantize, cluster
from jaxcompress.trace import LeafLayout

PLAIN = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def gamma(*shape, seed=1):
    return np.random.default_rng(seed).gamma(0.5, size=shape).astype(np.float32)


def one(leaf, spec, layout=PLAIN, h=None):
    """The compressed leaf, and its info; of a stack, the info of every entry."""
    importance = None if h is None else {"w": jnp.asarray(h)}
    found, info = additive_quantize(
        {"w": jnp.asarray(leaf)}, spec, importance=importance, layouts={"w": layout}, select=lambda _: {"w": True}
    )
    validate_array(found["w"])
    return found["w"], list(info.values()) if layout.stack_axes else info["w"]


def values_of(leaf):
    """The formula, run by run, in float64."""
    axis = leaf.axis + leaf.ndim
    codes, table = np.moveaxis(np.asarray(leaf.codes()), axis, -2), np.asarray(leaf.table, np.float64)
    *places, count, width = *codes.shape, leaf.width
    runs = np.zeros((*places, leaf.length))
    blocks = np.broadcast_to(np.moveaxis(table, axis, leaf.ndim - 1), (*places[:-1], 1, *table.shape[-3:]))
    for at in np.ndindex(*places):
        for m in range(count):
            runs[at] += blocks[at[:-1]][0, m, codes[(*at, m)]]
    values = np.moveaxis(runs.reshape(*places[:-1], -1)[..., :width], -1, axis)
    return values if leaf.scale is None else values * np.asarray(leaf.scale, np.float64)


def energy(h, x):
    return float((np.asarray(h, np.float64) * np.asarray(x, np.float64) ** 2).sum())


@pytest.mark.parametrize(
    "spec",
    [
        AdditiveSpec(length=3, tables=2, values=5, dtype="float32"),
        AdditiveSpec(length=5, tables=1, values=6),
        AdditiveSpec(length=4, tables=3, values=4, beam=2, scaled=False),
    ],
)
def test_the_error_never_rises_and_is_that_of_what_is_stored(spec):
    w, h = normal(38, 17), gamma(38, 1)
    leaf, info = one(w, spec, h=h)
    assert all(now <= before for before, now in itertools.pairwise(info.errors))
    assert info.errors[-1] < info.errors[0] or spec.tables == 1
    assert len(info.errors) == spec.rounds + 1
    np.testing.assert_allclose(leaf.materialize(), values_of(leaf), rtol=1e-5, atol=1e-6)
    wanted = np.sqrt(energy(h, w - values_of(leaf)) / energy(h, w))
    assert info.error == pytest.approx(wanted, rel=1e-5)
    assert info.errors[-1] == pytest.approx(wanted, rel=1e-4)
    assert info.bits_per_weight == leaf.nbits / w.size
    codes = -(-38 // spec.length) * 17 * spec.tables
    assert leaf.codes().size == codes
    assert leaf.nbits >= codes * spec.bits + leaf.table.size * 8 * leaf.table.dtype.itemsize


LAYOUTS = {
    "in, out": ((26, 9), PLAIN),
    "out, in": ((9, 26), LeafLayout(kind="matmul", input_axes=(1,), output_axes=(0,))),
    "embedding": ((21, 7), LeafLayout(kind="lookup", input_axes=(1,), output_axes=(0,))),
    "heads, width, out": ((3, 8, 10), LeafLayout(kind="matmul", input_axes=(0, 1), output_axes=(2,))),
    "in, heads, width": ((10, 3, 8), LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1, 2))),
    "convolution": ((3, 5, 1, 11), LeafLayout(kind="conv", input_axes=(0, 1, 2), output_axes=(3,))),
    "layers": ((2, 10, 7), LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,))),
    "experts last": ((10, 7, 2), LeafLayout(kind="matmul", stack_axes=(2,), input_axes=(0,), output_axes=(1,))),
    "vector": ((30,), LeafLayout(kind="other", output_axes=(0,))),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name):
    shape, layout = LAYOUTS[name]
    w, h = normal(*shape), gamma(*shape)
    leaf, info = one(w, AdditiveSpec(length=4, tables=2, values=6, rounds=2), layout, h)
    assert (leaf.shape, leaf.dtype, leaf.data.bits) == (shape, jnp.float32, 3)
    free = layout.input_axes or layout.output_axes
    assert leaf.axis + leaf.ndim in free
    own = [n if axis in layout.stack_axes else 1 for axis, n in enumerate(shape)]
    assert leaf.table.shape == (*own, 2, 6, 4)
    outputs = [axis for axis in layout.output_axes if axis != leaf.axis + leaf.ndim]
    assert leaf.scale.shape == tuple(n if a in (*layout.stack_axes, *outputs) else 1 for a, n in enumerate(shape))
    np.testing.assert_allclose(leaf.materialize(), values_of(leaf), rtol=1e-5, atol=1e-6)
    stack = int(np.prod(own))
    copies = [
        np.moveaxis(part, layout.stack_axes, [*range(len(layout.stack_axes))]) for part in (h, w, values_of(leaf))
    ]
    infos = info if layout.stack_axes else [info]
    for copy, *parts in zip(infos, *(part.reshape(stack, -1) for part in copies), strict=True):
        assert copy.error == pytest.approx(
            np.sqrt(energy(parts[0], parts[1] - parts[2]) / energy(*parts[:2])), rel=1e-5
        )
        assert copy.error < 0.8


def test_copies_of_a_stack_and_transposed_kernels_are_compressed_alike():
    spec = AdditiveSpec(length=4, tables=2, values=6, rounds=2)
    w, h = normal(2, 10, 7), gamma(2, 10, 1)
    stacked, infos = one(w, spec, LAYOUTS["layers"][1], h)
    for at in range(2):
        alone, info = one(w[at], spec, PLAIN, h[at])
        assert infos[at].errors == pytest.approx(info.errors, rel=1e-4)
        np.testing.assert_array_equal(stacked.materialize()[at], alone.materialize())
    turned, _ = one(w[0].T, spec, LAYOUTS["out, in"][1], h[0].T)
    np.testing.assert_array_equal(turned.materialize().T, stacked.materialize()[0])


def test_runs_that_repeat_are_found_and_beat_single_values():
    """Eight different runs and noise: three bits for four weights, where k-means of weights would need many more."""
    rng = np.random.default_rng(0)
    runs = rng.normal(size=(8, 4))
    w = runs[rng.integers(0, 8, (16, 50))].transpose(0, 2, 1).reshape(64, 50) + 0.01 * rng.normal(size=(64, 50))
    _, info = one(w.astype(np.float32), AdditiveSpec(length=4, tables=1, values=8, scaled=False))
    assert info.error < 0.02
    _, scalar = cluster({"w": jnp.asarray(w, jnp.float32)}, CodebookSpec(values=4, zero=False))
    assert info.error < scalar["w"].error / 5
    _, sums = one(normal(64, 50), AdditiveSpec(length=2, tables=2, values=4, scaled=False))
    _, scalar = cluster({"w": jnp.asarray(normal(64, 50))}, CodebookSpec(values=4, zero=False))
    assert sums.error < scalar["w"].error


def test_importance_lowers_the_error_that_it_weighs():
    w, h, spec = normal(40, 20), gamma(40, 1), AdditiveSpec(length=4, tables=2, values=8)
    weighted, plain = one(w, spec, h=h)[0].materialize(), one(w, spec)[0].materialize()
    assert energy(h, w - weighted) < 0.9 * energy(h, w - plain)
    assert energy(1, w - plain) < energy(1, w - weighted)
    none = one(w, spec, h=np.zeros((1, 1)))[0].materialize()
    np.testing.assert_array_equal(none, plain)
    some = h * (np.arange(40)[:, None] >= 8)
    leaf, info = one(w, spec, h=some)
    assert np.isfinite(np.asarray(leaf.materialize())).all()
    assert info.errors[-1] < info.errors[0]


def test_channels_of_unlike_size_share_entries_and_zeros_stay():
    w = normal(32, 24)
    sizes = 10.0 ** np.linspace(-6, 6, 24)
    sizes[5] = 0
    leaf, _ = one(
        (w * sizes).astype(np.float32),
        AdditiveSpec(length=4, tables=2, values=16, rounds=3),
        h=1 / (sizes + 1e-6) ** 2 * np.ones((1, 1)),
    )
    errors = np.linalg.norm(leaf.materialize() - w * sizes, axis=0) / np.maximum(
        np.linalg.norm(w * sizes, axis=0), 1e-30
    )
    assert errors.max() < 0.9
    np.testing.assert_array_equal(leaf.materialize()[:, 5], 0)


FEW = {
    "no inputs": np.zeros((0, 4)),
    "no outputs": np.zeros((6, 0)),
    "zeros": np.zeros((6, 4)),
    "constant": np.full((6, 4), 2.0),
    "unit matrix": np.eye(6, 4),
}


@pytest.mark.parametrize("name", FEW)
def test_few_different_runs_are_exact(name):
    """As many runs as entries, or fewer; and the same ones many times over."""
    for scaled in (True, False):
        spec = AdditiveSpec(length=2, tables=2, values=12, scaled=scaled, rounds=1, dtype="float32")
        for w in (FEW[name], np.tile(FEW[name], (1, 5))):
            leaf, info = one(w.astype(np.float32), spec)
            np.testing.assert_allclose(leaf.materialize(), w, rtol=1e-6)
            assert info.error == pytest.approx(0, abs=1e-6)


def test_half_precision_and_leaves_that_are_compressed():
    w, spec = jnp.asarray(normal(20, 9), jnp.bfloat16), AdditiveSpec(length=4, tables=1, values=16, rounds=2)
    leaf, _ = one(w, spec)
    assert leaf.table.dtype == leaf.scale.dtype == leaf.dtype == leaf.materialize().dtype == jnp.bfloat16
    assert additive_quantize({"w": leaf, "v": jnp.ones((4, 2))}, spec)[0]["w"] is leaf
    shared = cluster({"w": w}, CodebookSpec(values=8))[0]["w"]
    again = one(shared.materialize(), spec)[0].materialize()
    np.testing.assert_array_equal(additive_quantize({"w": shared}, spec)[0]["w"].materialize(), again)


def test_what_cannot_be_compressed():
    spec = AdditiveSpec(length=4, tables=2, values=16)
    with pytest.raises(ValueError, match="'a/w' holds 1 NaN and 1 Inf"):
        additive_quantize({"a": {"w": jnp.array([[jnp.nan, jnp.inf, 1.0]])}}, spec)
    with pytest.raises(ValueError, match="'w' of dtype int32"):
        additive_quantize({"w": jnp.ones((2, 2), jnp.int32)}, spec)
    with pytest.raises(ValueError, match="'w' is sparse"):
        additive_quantize({"w": sparsify(jnp.ones((2, 2)), jnp.eye(2, dtype=bool))}, spec)
    with pytest.raises(ValueError, match="'w' is a scalar"):
        additive_quantize({"w": jnp.ones(())}, spec, select=lambda _: {"w": True})
    with pytest.raises(ValueError, match=r"'w' of shape \(3,\) has stacked axes only"):
        one(np.ones(3), spec, LeafLayout(kind="matmul", stack_axes=(0,)))
    for h in (-jnp.ones((2, 1)), jnp.full((1, 2), jnp.nan)):
        with pytest.raises(ValueError, match="`importance` of leaf 'w' must be finite and at least 0"):
            additive_quantize({"w": jnp.ones((2, 2))}, spec, importance={"w": h})
    with pytest.raises(ValueError, match="nothing is selected"):
        additive_quantize({"w": jnp.ones(2)}, spec)


@pytest.mark.parametrize(
    "wrong",
    [
        {"length": 0},
        {"tables": 0},
        {"tables": 9},
        {"values": 1},
        {"values": 257},
        {"beam": 0},
        {"rounds": -1},
    ],
)
def test_options_are_checked(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        AdditiveSpec(**{"length": 4, "tables": 1, "values": 16, **wrong})


def test_the_kind_of_the_result():
    leaf, info = one(normal(8, 4), AdditiveSpec(length=8, tables=2, values=256, rounds=0))
    assert isinstance(leaf, AdditiveCodebookArray)
    assert (leaf.bits, leaf.length, leaf.codes().dtype) == (8, 8, jnp.uint8)
    assert info.bits_per_weight == (4 * 2 * 8 + 2 * 256 * 8 * 16 + 4 * 16) / 32
