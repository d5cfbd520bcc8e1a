"""`execute` in whatever JAX offers around a function: transformations in one another, contexts, dtypes, devices.

Each row computes the same by compiled kernels and by the arrays themselves.
"""

import functools
import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress._src.types import is_compressed
from jaxcompress.quantization import QuantSpec, quantize, quantize_inputs

SPECS = {
    "int8": (QuantSpec(bits=8), None),
    "uint4 groups": (QuantSpec(bits=4, group_size=32, symmetric=False), None),
    "int8 inputs": (QuantSpec(bits=8), QuantSpec(bits=8)),
    "uint8 inputs of groups": (QuantSpec(bits=4, group_size=32), QuantSpec(bits=8, symmetric=False)),
}
KINDS = pytest.mark.parametrize("kind", SPECS)


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def made(kind, plain=None, layouts=None):
    weights, inputs = SPECS[kind]
    params = quantize({"w": drawn(64, 64) / 8} if plain is None else plain, weights, layouts=layouts)[0]
    return params if inputs is None else quantize_inputs(params, inputs, layouts=layouts)[0]


def apply(params, x):
    return jnp.tanh(x @ params["w"])


X = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
by_kernels, by_itself = jc.execute(apply), jc.execute(apply, kernels=())


def assert_close(actual, expected, tolerance=1e-4):
    def compare(a, b):
        assert a.dtype == b.dtype
        a, b = (np.asarray(each, np.float64) for each in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

    jax.tree.map(compare, actual, expected)


def looped(run, params, x):
    """A derivative of a scan, in a batch."""

    def loss(x):
        return jax.lax.scan(lambda h, _: (run(params, h), h.sum()), x, None, length=3)[0].sum()

    return jax.vmap(jax.grad(loss))(jnp.stack([x, 2 * x]))


def branched(run, params, x):
    def step(carry):
        return carry[0] + 1, run(params, carry[1])

    h = jax.lax.while_loop(lambda carry: carry[0] < 3, step, (0, x))[1]
    return jax.lax.cond(h.sum() > 0, lambda h: run(params, h), lambda h: -run(params, h), h)


NESTED = {
    "scan, derivative, batch": looped,
    "while, cond": branched,
    "batch of leaves": lambda run, params, x: jax.vmap(run)(
        jax.tree.map(lambda part: jnp.stack([part, part]), params), jnp.stack([x, x + 1])
    ),
    "checkpoint": lambda run, params, x: jax.grad(lambda x: jax.checkpoint(run)(params, x).sum())(x),
    "linearize": lambda run, params, x: jax.linearize(functools.partial(run, params), x)[1](x),
    "hessian": lambda run, params, x: jax.hessian(lambda s: run(params, x * s).sum())(1.0),
    "no rows": lambda run, params, x: jax.grad(lambda x: run(params, x).sum())(x[:0]),
    "jaxpr": lambda run, params, x: jaxpr_as_fun(jax.make_jaxpr(run)(params, x))(*jax.tree.leaves((params, x)))[0],
    "ahead of time": lambda run, params, x: jax.jit(run).lower(params, x).compile()(params, x),
}


@KINDS
@pytest.mark.parametrize("name", NESTED)
def test_nested_transformations(name, kind):
    params = made(kind)
    actual, expected = (NESTED[name](run, params, jnp.asarray(X)) for run in (by_kernels, by_itself))
    assert_close(actual, expected)
    if name != "ahead of time":
        assert_close(jax.jit(functools.partial(NESTED[name], by_kernels))(params, X), expected)


@KINDS
def test_stacks_of_stacks_under_scans_batches_derivatives_and_checkpoints(kind):
    def deep(params, x):
        def outer(h, stack):
            return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, stack)

        return jax.lax.scan(outer, x, params["w"])[0]

    plain = {"w": drawn(2, 3, 64, 64) / 8}
    params = made(kind, plain, jc.trace.layouts(deep, plain, X))
    xs = jnp.stack([X, 2 * X])

    def gradients(kernels, remat):
        run = jax.checkpoint(deep) if remat else deep
        run = jc.execute(run, kernels=kernels)
        return jax.jit(jax.vmap(jax.grad(lambda x: run(params, x).sum())))(xs)

    expected = gradients((), False)
    assert_close(gradients(None, False), expected)
    assert_close(gradients(None, True), expected)


CONTEXTS = {
    "no transfers": lambda: jax.transfer_guard("disallow"),
    "no compilation": jax.disable_jit,
    "looking for NaN": lambda: jax.debug_nans(True),
    "all the precision": lambda: jax.default_matmul_precision("highest"),
    "64 bits": lambda: jax.enable_x64(True),
}


@KINDS
@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts(name, kind):
    params, x = made(kind), jnp.asarray(X)
    expected = by_itself(params, x)
    with CONTEXTS[name]():
        results = by_kernels(params, x), jax.jit(by_kernels)(params, x)
    for result in results:
        assert_close(result, expected)


@KINDS
@pytest.mark.parametrize("weights", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("inputs", ["float16", "bfloat16", "float32", "float64", "int16", "int32", "uint8", "bool"])
def test_dtypes(inputs, weights, kind):
    with jax.enable_x64(True):
        params = made(kind, {"w": (drawn(64, 64) / 8).astype(weights)})
        x = jnp.asarray(X > 0 if inputs == "bool" else np.abs(X), inputs)
        expected = by_itself(params, x)
        assert expected.dtype == apply(jc.materialize(params), x).dtype
        # Kernels do not round weights, or the values of codes of inputs, to their 16 bits.
        is_half = any("float16" in dtype for dtype in (str(expected.dtype), weights, inputs))
        tolerance = 2e-2 if is_half else 1e-4
        assert_close(by_kernels(params, x), expected, tolerance)
        assert_close(jax.jit(by_kernels)(params, x), expected, tolerance)


@KINDS
def test_donated_arrays(kind):
    params, expected = made(kind), by_itself(made(kind), X)
    step = jax.jit(lambda params, x: (by_kernels(params, x), params), donate_argnums=(0,))
    for _ in range(3):
        y, params = step(params, X)
        assert_close(y, expected)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        assert_close(jax.jit(by_kernels, donate_argnums=(1,))(params, jnp.array(X)), expected)


@KINDS
@pytest.mark.parametrize("run", [by_kernels, jax.jit(by_kernels)], ids=["eager", "jit"])
def test_one_function_called_by_several_threads(run, kind):
    params = made(kind)
    expected = by_itself(params, X)
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: run(params, X), range(40)):
            assert_close(y, expected)


# ---- devices


@KINDS
@pytest.mark.parametrize("spec", [P(None, "b"), P("b", None)], ids=str)
def test_shardings_of_arguments(spec, kind):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    params = made(kind)
    sharding = functools.partial(jc.arrays.component_shardings, sharding=NamedSharding(mesh, spec))
    shardings = jax.tree.map(sharding, params, is_leaf=is_compressed)
    program = jax.jit(by_kernels, in_shardings=(shardings, NamedSharding(mesh, P("a"))))
    expected = by_itself(params, X)
    assert_close(program(params, X), expected)
    assert_close(by_kernels(jax.device_put(params, shardings), X), expected)


@KINDS
@pytest.mark.parametrize("second", [AxisType.Explicit, AxisType.Auto])
def test_meshes_with_explicit_axes(second, kind):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit, second))
    params = made(kind)
    expected = by_itself(params, X), jax.grad(lambda x: by_itself(params, x).sum())(X)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("a", None)))
        placed = jax.device_put(params, NamedSharding(mesh, P()))
        assert_close(by_kernels(placed, x), expected[0])
        assert_close(jax.jit(by_kernels)(placed, x), expected[0])
        assert_close(jax.jit(jax.grad(lambda x: by_kernels(placed, x).sum()))(x), expected[1])


@KINDS
@pytest.mark.parametrize("options", [{}, {"check_vma": False}, {"axis_names": {"a"}}], ids=str)
def test_shard_map_along_all_axes_or_some(options, kind):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    params = made(kind)
    plans = []

    def planned(params, x):
        plans.append(jc.execution.plan(apply, params, x, platform="cpu"))
        return by_kernels(params, x)

    mapped = jax.shard_map(planned, mesh=mesh, in_specs=(P(), P("a")), out_specs=P("a"), **options)
    assert_close(jax.jit(mapped)(params, X), by_itself(params, X))
    if "axis_names" in options:
        assert "along some axes of the mesh only" in str(plans[0].matmuls[0].refused)


@KINDS
def test_one_of_several_devices(kind):
    params, device = made(kind), jax.devices()[3]
    y = by_kernels(jax.device_put(params, device), jax.device_put(X, device))
    assert y.devices() == {device}
    assert_close(y, by_itself(params, X))
