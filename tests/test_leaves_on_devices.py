"""Calibration and one-shot methods on 8 devices: rows, sums and leaves are spread, and results are those of one device.

Inputs are small integers: sums of them are exact in any order, and so codes and masks must be equal, not close.
"""

import dataclasses
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_table import Place

import jaxcompress as jc
from jaxcompress._src.calibration import moments as _moments
from jaxcompress._src.calibration.program import build
from jaxcompress._src.calibration.statistics import statistics_shardings
from jaxcompress._src.quantization import reconstruct as _reconstruct
from jaxcompress._src.trace.traced import split_arrays
from jaxcompress._src.weights import side_by_side
from jaxcompress.calibration import InputStatistics, input_statistics
from jaxcompress.quantization import QuantSpec
from jaxcompress.trace import LeafLayout

ROWS = 104  # in shares of 26: no other size of the model
SPECS = {
    "fsdp": P("data", None),
    "tensor": P(None, "model"),
    "both": P(("data", "model"), None),
    "stack": P(None, "model", None),
    "uneven": P("data", None),
    "table": P("model", None),
}
SPEC = QuantSpec(bits=4, group_size=8, partial_groups=True)


@functools.cache
def mesh():
    return Place(AxisType.Auto).mesh


@functools.cache
def model():
    """Params, inputs, and layouts; six entries of a stack and three leaves of one shape, and one of another."""
    rng = np.random.default_rng(0)
    shapes = {"fsdp": (16, 8), "tensor": (16, 8), "both": (16, 8), "stack": (6, 16, 8), "uneven": (12, 6)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    params["both"] = params["both"].astype(jnp.bfloat16)
    params["table"] = jnp.asarray(rng.normal(size=(10, 8)), jnp.float32)
    inputs = [jnp.asarray(rng.integers(-3, 4, size=(ROWS, size)), jnp.float32) for size in (16, 12)]
    inputs.append(jnp.asarray(rng.integers(-3, 4, size=(6, ROWS, 16)), jnp.float32))
    inputs.append(jnp.asarray(rng.integers(0, 10, size=(ROWS,))))
    return params, tuple(inputs), jc.trace.layouts(apply, params, *inputs)


def apply(params, x, y, layers, ids):
    outputs = [x @ params[name] for name in ("fsdp", "tensor", "both")]
    _, stacked = jax.lax.scan(lambda _, each: (None, each[0] @ each[1]), None, (layers, params["stack"]))
    return *outputs, stacked, y @ params["uneven"], params["table"][ids]


def put(value, spec):
    return jax.device_put(value, NamedSharding(mesh(), spec))


@functools.cache
def on_mesh():
    params, inputs, _ = model()
    sharded = {name: put(leaf, SPECS[name]) for name, leaf in params.items()}
    return sharded, tuple(map(put, inputs, (P("data"), P("data"), P(None, "data"), P("data"))))


@functools.cache
def statistics(where):
    params, inputs = model()[:2] if where == "one device" else on_mesh()
    return input_statistics(apply, model()[0] if where == "params on one device" else params, [inputs, inputs])


def shares(array):
    assert len(array.sharding.device_set) == 8
    return {shard.data.shape for shard in array.addressable_shards}


@pytest.mark.parametrize("where", ["mesh", "params on one device"])
def test_products_of_inputs_are_cut_over_the_devices(where):
    for name, found in statistics(where).items():
        for one, many in zip(*map(jax.tree.leaves, (statistics("one device")[name], found)), strict=True):
            np.testing.assert_array_equal(many, one, err_msg=name)
    sums = statistics(where)
    assert shares(sums["fsdp"].gram) == {(2, 16)}
    assert shares(sums["stack"].gram) == {(6, 2, 16)}
    assert shares(sums["uneven"].gram) == {(3, 12)}  # of 4 x 2 devices, 4 divide it
    assert shares(sums["fsdp"].absolute_max) == {(16,)}
    assert shares(sums["table"].rows) == {(10,)}


def test_products_on_a_mesh_of_explicit_axes_are_cut():
    assert shares(Place(AxisType.Explicit).statistics["fsdp"]["kernel"].gram) == {(2, 16)}


def sizes(compiled):
    """All sizes of axes in a compiled program, as one device sees them."""
    return {int(size) for shape in re.findall(r"\w+\[([\d,]+)\]", compiled.as_text()) for size in shape.split(",")}


def test_rows_stay_where_they_are():
    params, inputs = on_mesh()
    program = build(apply, params, inputs, select=None, statistics=("gram",), row_mask=None)
    (arrays, _), (dynamic, static) = split_arrays(params), split_arrays(inputs)
    totals = {n: jax.device_put(each, statistics_shardings(each, mesh())) for n, each in program.zeros().items()}
    step = inspect.getclosurevars(program.step).nonlocals["compiled"]
    found = sizes(step.lower(totals, (arrays,), dynamic, static, None, mesh()).compile())
    assert ROWS // 4 in found
    assert ROWS not in found


def grouped():
    """A leaf of two groups, with the statistics of each."""
    rng = np.random.default_rng(1)
    rows = rng.integers(-3, 4, size=(2, ROWS, 16)).astype(np.float32)
    sums = InputStatistics(
        count=jnp.full(2, ROWS, jnp.float32), gram=jnp.asarray(np.einsum("gni,gnj->gij", rows, rows))
    )
    layout = LeafLayout(kind="conv", input_axes=(0,), output_axes=(1,), groups=2)
    return jnp.asarray(rng.normal(size=(16, 16)), jnp.float32), sums, layout


def with_grouped(where):
    """Params, statistics and layouts of everything that methods with statistics take."""
    weight, sums, layout = grouped()
    params = model()[0] if where == "one device" else on_mesh()[0]
    if where == "mesh":
        weight, sums = put(weight, P("data", "model")), jax.device_put(sums, statistics_shardings(sums, mesh()))
    layouts = model()[2] | {"grouped": layout}
    return params | {"grouped": weight}, statistics(where) | {"grouped": sums}, layouts


# What each round of entries is: the shares of weights that each device is given, and how many of them are busy.
ENTRIES, UNEVEN, GROUPS = {(1, 16, 8)}, {(1, 12, 6)}, {(2, 16, 8)}
METHODS = {
    "gptq": (
        functools.partial(
            jc.quantization.gptq, spec=SPEC, select=jc.tree.by_path("fsdp|tensor|both|stack|grouped|table")
        ),
        [(ENTRIES, 8), (ENTRIES, 1), (GROUPS, 1)],
    ),
    "sparsegpt": (
        functools.partial(jc.pruning.sparsegpt, sparsity=0.5, select=jc.tree.by_path("fsdp|tensor|uneven")),
        [(ENTRIES, 2), (UNEVEN, 1)],
    ),
    "alps": (
        functools.partial(jc.pruning.alps, sparsity=0.5, iterations=2, select=jc.tree.by_path("both|stack")),
        [(ENTRIES, 7), (ENTRIES, 7)],
    ),
    "wanda": (functools.partial(jc.pruning.wanda, sparsity=0.5, select=jc.tree.by_path("fsdp|stack")), []),
}


@pytest.mark.parametrize("method", METHODS)
def test_leaves_are_spread_and_come_back(method, monkeypatch):
    call, expected_rounds = METHODS[method]
    rounds = []

    def spy(parts, busy, **options):
        rounds.append((shares(parts["weights"]), int(np.sum(busy))))
        (weight,), (gram,) = rounds[-1][0], shares(parts["gram"])
        assert gram == (*weight[:2], weight[1])
        return solve(parts, busy, **options)

    solve = side_by_side._solved_round
    monkeypatch.setattr(side_by_side, "_solved_round", spy)
    results = []
    for where in ("one device", "mesh"):
        params, sums, layouts = with_grouped(where)
        results.append(call(params, sums, layouts=layouts))
    (expected, wanted), (found, infos) = results
    assert sorted(rounds, key=str) == sorted(expected_rounds, key=str)
    assert list(infos) == list(wanted)
    for name, info in infos.items():
        assert info.error == pytest.approx(wanted[name].error, rel=1e-4, abs=1e-6)
        assert info.error_before == pytest.approx(wanted[name].error_before, rel=1e-4, abs=1e-6)
    for name in {name.split("[")[0] for name in infos}:
        leaf = found[name]
        for many, one in zip(jax.tree.leaves(leaf), jax.tree.leaves(expected[name]), strict=True):
            if jnp.issubdtype(one.dtype, jnp.integer):
                np.testing.assert_array_equal(many, one, err_msg=name)
            np.testing.assert_array_equal(np.asarray(many) == 0, np.asarray(one) == 0, err_msg=name)
            np.testing.assert_allclose(
                np.asarray(many, np.float32),
                np.asarray(one, np.float32),
                rtol=1e-2 if name == "both" else 1e-4,
                atol=1e-5,
            )
        largest = max(jax.tree.leaves(leaf), key=lambda part: part.nbytes)
        assert largest.sharding.is_equivalent_to(NamedSharding(mesh(), SPECS.get(name, P("data", "model"))), leaf.ndim)


def test_statistics_on_a_mesh_spread_leaves_that_are_on_one_device():
    layouts = model()[2]
    chosen = jc.tree.by_path("fsdp|uneven")
    (one, _), (many, _) = (
        jc.pruning.sparsegpt(model()[0], sums, sparsity=0.5, select=chosen, layouts=layouts)
        for sums in (statistics("one device"), statistics("mesh"))
    )
    for name in ("fsdp", "uneven"):
        np.testing.assert_allclose(many[name], one[name], rtol=1e-4, atol=1e-5)
        assert many[name].sharding.is_fully_replicated


def chain(params, x):
    x = jnp.tanh(x @ params["first"] + params["bias"][None])
    return x + jnp.tanh(x @ params["second"])


def test_reconstruct_keeps_rows_and_spreads_outputs(monkeypatch):
    rng = np.random.default_rng(2)
    shapes = {"first": (16, 8), "bias": (8,), "second": (8, 8)}
    params = {name: jnp.asarray(rng.normal(size=shape) / 4, jnp.float32) for name, shape in shapes.items()}
    specs = {"first": P(None, "model"), "bias": P("model"), "second": P("model", None)}
    batches = [(jnp.asarray(rng.normal(size=(ROWS, 16)), jnp.float32),) for _ in range(2)]
    padding = jnp.asarray(rng.integers(0, 2, size=ROWS), jnp.float32)
    options = {"spec": dataclasses.replace(SPEC, partial_groups=False), "row_mask": lambda x: padding}
    expected, wanted = jc.quantization.reconstruct(chain, params, batches, **options)
    codes, summed = [], []
    rounded, sums = _reconstruct._rounded, _moments._sums

    def spy(*args):
        solved, weights = rounded(*args)
        codes.append(shares(solved.codes))
        return solved, weights

    def spy_sums(*args):
        summed.append(sizes(sums.__wrapped__.lower(*args).compile()))
        return sums(*args)

    monkeypatch.setattr(_reconstruct, "_rounded", spy)
    monkeypatch.setattr(_moments, "_sums", spy_sums)
    sharded = {name: put(leaf, specs[name]) for name, leaf in params.items()}
    found, infos = jc.quantization.reconstruct(chain, sharded, [(put(x, P("data")),) for (x,) in batches], **options)
    assert codes == [{(16, 1)}, {(8, 1)}]  # each device has one of the outputs
    assert len(summed) == 4
    # The weights of the rows are the caller's, and on every device.
    assert all(ROWS // 4 in each for each in summed)
    for name, leaf in found.items():
        for many, one in zip(jax.tree.leaves(leaf), jax.tree.leaves(expected[name]), strict=True):
            np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-5, err_msg=name)
        largest = max(jax.tree.leaves(leaf), key=lambda part: part.nbytes)
        assert largest.sharding.is_equivalent_to(NamedSharding(mesh(), specs[name]), leaf.ndim)
    for name, info in infos.items():
        assert info.error == pytest.approx(wanted[name].error, rel=1e-3)
