"""Sparse weights, expanded by compiled kernels bit for bit as in JAX, or multiplied piece by piece; and transformed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress._src.execution.kernels import choice
from jaxcompress._src.execution.kernels.matmul import Matmul
from jaxcompress._src.execution.kernels.native import build_hook, library
from jaxcompress._src.execution.kernels.native.expand import SparseFormat
from jaxcompress._src.execution.kernels.native_expansion import EXPANSION, expanded_after
from jaxcompress.arrays import QuantizedArray, sparsify

needs_library = pytest.mark.skipif(
    build_hook.compiler() is None and library.why_missing() is not None,
    reason="no C++ compiler here, and no library that was built elsewhere",
)
NF4 = tuple(np.sort(np.random.default_rng(4).normal(size=16)).astype(np.float32).tolist())
MASKED = {"columns": (37, 70), "few columns": (70, 5), "bytes": (32, 64), "one": (1, 1), "wide": (3, 1030)}
CODES = {
    "int4": {"bits": 4},
    "uint4 zero points": {"bits": 4, "signed": False, "zeros": "uint8"},
    "int8": {"bits": 8},
    "uint8 zero points": {"bits": 8, "signed": False, "zeros": "float32"},
    "int3": {"bits": 3},
    "levels": {"bits": 4, "signed": False, "levels": NF4},
    "levels of 8 bits": {"bits": 8, "signed": False, "levels": tuple(np.linspace(-1, 1, 256).tolist())},
}


def masked(rng, shape, *, keep=0.4, dtype="float32", stack_ndim=0, shards=1):
    values = jnp.asarray(rng.normal(size=shape), dtype)
    return sparsify(values, jnp.asarray(rng.random(shape) < keep), stack_ndim=stack_ndim, shards=shards)


def places(rng, shape, pattern, axis):
    """Masks of at most N of every M entries."""
    kept, run = pattern
    draws = np.moveaxis(rng.random(shape), axis, -1)
    width = draws.shape[-1]
    draws = np.pad(draws, [(0, 0)] * (len(shape) - 1) + [(0, -width % run)], constant_values=-1)
    runs = draws.reshape(*draws.shape[:-1], -1, run)
    mask = (np.argsort(np.argsort(-runs, -1), -1) < kept) & (runs > 0.1)
    return jnp.asarray(np.moveaxis(mask.reshape(draws.shape)[..., :width], -1, axis))


def patterned(rng, shape, *, pattern=(2, 4), axis=-2, dtype="float32"):
    return sparsify(
        jnp.asarray(rng.normal(size=shape), dtype), places(rng, shape, pattern, axis), pattern=pattern, axis=axis
    )


def patterned_codes(rng, shape, blocks, *, bits, pattern=(2, 4), axis=-2, signed=True, zeros=None, levels=None):
    low = -(2 ** (bits - 1)) if signed else 0
    codes = jnp.asarray(rng.integers(low, low + 2**bits, size=shape), jnp.int8 if signed else jnp.uint8)
    data = sparsify(codes, places(rng, shape, pattern, axis), pattern=pattern, axis=axis)
    return QuantizedArray(
        data=data.with_packed_values(bits) if bits < 8 else data,
        scale=jnp.asarray(rng.normal(size=blocks), jnp.float32),
        dtype=jnp.dtype("float32"),
        zero_point=None if zeros is None else jnp.asarray(rng.integers(0, 2**bits, size=blocks), zeros),
        levels=levels,
    )


def masked_codes(
    rng,
    shape,
    blocks,
    *,
    bits,
    signed=True,
    zeros=None,
    levels=None,
    keep=0.4,
    stack_ndim=0,
    shards=1,
    scale="bfloat16",
):
    low = -(2 ** (bits - 1)) if signed else 0
    codes = jnp.asarray(rng.integers(low, low + 2**bits, size=shape), jnp.int8 if signed else jnp.uint8)
    data = sparsify(codes, jnp.asarray(rng.random(shape) < keep), stack_ndim=stack_ndim, shards=shards)
    return QuantizedArray(
        data=data.with_packed_values(bits) if bits < 8 else data,
        scale=jnp.asarray(rng.normal(size=blocks), scale),
        dtype=jnp.dtype("float32"),
        zero_point=None if zeros is None else jnp.asarray(rng.integers(0, 2**bits, size=blocks), zeros),
        levels=levels,
    )


def assert_same_bits(actual, expected):
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert np.asarray(actual).tobytes() == np.asarray(expected).tobytes()


def check_expansion(leaf):
    expand, plain = jax.jit(expanded_after), jax.jit(lambda leaf: leaf.materialize())(leaf)
    for name in library.INSTRUCTION_SETS:
        with library.limited_to(name):
            assert_same_bits(expand(leaf, jnp.ones(1)), plain)


@needs_library
@pytest.mark.parametrize("keep", [0, 0.4, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", MASKED)
def test_masked_values_are_where_they_belong(shape, dtype, keep):
    leaf = masked(np.random.default_rng(0), MASKED[shape], dtype=dtype, keep=keep)
    odd = jnp.asarray([np.nan, np.inf, -np.inf, -0.0, 1e-40, -1], dtype)[: leaf.values.size]
    check_expansion(dataclasses.replace(leaf, values=leaf.values.at[0, : len(odd)].set(odd)))


@needs_library
@pytest.mark.parametrize("blocks", [(1, 1), (8, 1), (1, 10), (4, 7), (32, 70), (8, 70)], ids=str)
@pytest.mark.parametrize("name", CODES)
def test_masked_codes_with_any_blocks(name, blocks):
    check_expansion(masked_codes(np.random.default_rng(1), (32, 70), blocks, **CODES[name]))


@needs_library
@pytest.mark.parametrize("shards", [1, 4])
def test_masks_of_several_axes_entries_and_shards(shards):
    rng = np.random.default_rng(2)
    check_expansion(masked(rng, (3, 8, 5, 6), stack_ndim=1, shards=shards))
    check_expansion(masked(rng, (2, 3, 8, 7), stack_ndim=2, shards=shards))
    check_expansion(masked(rng, (8,), shards=shards))
    for blocks in ((3, 4, 5, 1), (3, 1, 1, 1), (1, 8, 1, 2)):
        leaf = masked_codes(rng, (3, 8, 5, 6), blocks, stack_ndim=1, shards=shards, **CODES["uint4 zero points"])
        check_expansion(leaf)


@needs_library
@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("shape", [(30, 41), (6, 5, 7)], ids=str)
def test_masked_codes_with_a_shorter_last_group(shape, axis):
    blocks = [1] * len(shape)
    blocks[axis] = -(-shape[axis] // 4)
    leaf = masked_codes(np.random.default_rng(3), shape, [1] * len(shape), bits=4)
    scale = jnp.asarray(np.random.default_rng(4).normal(size=blocks), jnp.float32)
    check_expansion(dataclasses.replace(leaf, scale=scale, partial=(axis, 4)))


@needs_library
@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 2), (4, 8), (3, 7), (5, 16), (20, 200)], ids=str)
def test_patterned_values_are_where_they_belong(pattern, axis):
    rng = np.random.default_rng(20)
    for shape, dtype in (((37, 70), "float32"), ((3, 8, 5), "bfloat16"), ((5, 3), "float16")):
        check_expansion(patterned(rng, shape, pattern=pattern, axis=axis, dtype=dtype))
    check_expansion(patterned(rng, (3, 8, 5, 6), pattern=pattern, axis=axis - 1))


@needs_library
@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("blocks", [(1, 1), (8, 1), (1, 10), (4, 70)], ids=str)
@pytest.mark.parametrize("name", CODES)
def test_patterned_codes_with_any_blocks(name, blocks, axis):
    check_expansion(patterned_codes(np.random.default_rng(21), (32, 70), blocks, axis=axis, **CODES[name]))


def few_rows(leaf, x, *, sums_columns):
    apply = (lambda w, x: jnp.einsum("mk,nk->mn", x, w)) if sums_columns else (lambda w, x: x @ w)
    assert jc.execution.plan(apply, leaf, x).matmuls[0].kernel == "native_sparse"
    return jax.jit(jc.execute(apply))(leaf, x), jax.jit(apply)(leaf.materialize(), x)


SPARSE_LEAVES = {
    "mask": lambda rng, shape: masked(rng, shape),
    "nothing": lambda rng, shape: masked(rng, shape, keep=0),
    "mask of codes": lambda rng, shape: masked_codes(rng, shape, (1, shape[1]), **CODES["uint4 zero points"]),
    "mask of int8": lambda rng, shape: masked_codes(rng, shape, (shape[0], 1), bits=8),
    "2:4": lambda rng, shape: patterned(rng, shape),
    "2:4 along rows": lambda rng, shape: patterned(rng, shape, axis=-1),
    "3:7": lambda rng, shape: patterned(rng, shape, pattern=(3, 7)),
    "codes 2:4": lambda rng, shape: patterned_codes(rng, shape, (1, shape[1]), bits=4),
    "codes 2:4 with zero points": lambda rng, shape: patterned_codes(rng, shape, (1, 1), **CODES["uint8 zero points"]),
}


@needs_library
@pytest.mark.parametrize("sums_columns", [False, True])
@pytest.mark.parametrize("shape", [(300, 260), (37, 70), (5, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("name", SPARSE_LEAVES)
def test_few_rows_multiply_as_the_plain_weights_do(name, shape, sums_columns):
    rng = np.random.default_rng(22)
    leaf = SPARSE_LEAVES[name](rng, shape)
    for instructions in library.INSTRUCTION_SETS:
        for rows in (1, 3, 8):
            x = jnp.asarray(rng.normal(size=(rows, shape[1 if sums_columns else 0])), jnp.float32)
            with library.limited_to(instructions):
                assert_close(*few_rows(leaf, x, sums_columns=sums_columns))


@needs_library
@pytest.mark.parametrize("sums_columns", [False, True])
@pytest.mark.parametrize("name", SPARSE_LEAVES)
def test_inputs_that_are_not_finite_meet_what_is_not_stored(name, sums_columns):
    rng = np.random.default_rng(23)
    leaf = SPARSE_LEAVES[name](rng, (64, 64))
    for odd in (np.inf, -np.inf, np.nan):
        for rows in (1, 5):
            x = jnp.asarray(rng.normal(size=(rows, 64)), jnp.float32).at[0, 37].set(odd)
            actual, expected = map(np.asarray, few_rows(leaf, x, sums_columns=sums_columns))
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-2)


@needs_library
def test_starts_that_point_anywhere_read_no_other_memory():
    leaf = masked(np.random.default_rng(5), (6, 40))
    starts = jnp.asarray([5, 2**30, 10**9, 3, 10_000, 0], jnp.int32)
    check_expansion(dataclasses.replace(leaf, starts=starts))


# ---- transformations, against the plain product


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))


def assert_close(actual, expected):
    def compare(a, b):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5 * np.abs(b).max(initial=1e-30))

    jax.tree.map(compare, actual, expected)


def loss(product, *arguments):
    return jnp.mean(jnp.sin(product(*arguments) / 100) ** 2)


MASKED_LEAVES = {
    "values": lambda rng, stack, shards: masked(rng, (*stack, 16, 24), stack_ndim=len(stack), shards=shards),
    "codes": lambda rng, stack, shards: masked_codes(
        rng, (*stack, 16, 24), (*stack, 8, 24), bits=4, scale="float32", stack_ndim=len(stack), shards=shards
    ),
    "zero points": lambda rng, stack, shards: masked_codes(
        rng,
        (*stack, 16, 24),
        (*stack, 16, 3),
        **CODES["uint8 zero points"],
        scale="float32",
        stack_ndim=len(stack),
        shards=shards,
    ),
    "2:4": lambda rng, stack, shards: patterned(rng, (*stack, 16, 24)),
    "2:4 along rows": lambda rng, stack, shards: patterned(rng, (*stack, 16, 24), axis=-1),
    "codes 2:4": lambda rng, stack, shards: patterned_codes(rng, (*stack, 16, 24), (*stack, 4, 24), bits=4),
}


def masked_problem(name, stack=(), shards=1, kernel="native_expansion"):
    leaf = MASKED_LEAVES[name](np.random.default_rng(6), stack, shards)
    x = jnp.asarray(np.random.default_rng(7).normal(size=(5, 16)), jnp.float32)
    floats, rest = jc.tree.partition_trainable({"w": leaf})

    def product(kernels):
        run = jc.execute(lambda params, x: x @ params["w"], kernels=kernels)
        return lambda x, floats: run(jc.tree.combine(floats, rest), x)

    return product((kernel,)), product(()), x, floats


MASKED_TRANSFORMED = {
    "derivatives": lambda f, x, p: jax.grad(functools.partial(loss, f), (0, 1))(x, p),
    "of inputs": lambda f, x, p: jax.grad(functools.partial(loss, f))(x, p),
    "jvp": lambda f, x, p: jax.jvp(f, (x, p), (x + 1, p)),
    "second derivatives": lambda f, x, p: jax.hessian(lambda a: loss(f, x * a, jax.tree.map(lambda w: a * w, p)))(1.1),
    "batch of inputs": lambda f, x, p: jax.vmap(f, (0, None))(jnp.stack([x, x + 1]), p),
    "batch of weights": lambda f, x, p: jax.vmap(f, (None, 0))(x, jax.tree.map(lambda w: jnp.stack([w, 2 * w]), p)),
    "batch of both": lambda f, x, p: jax.vmap(f)(
        jnp.stack([x, x + 1]), jax.tree.map(lambda w: jnp.stack([w, 2 * w]), p)
    ),
    "derivatives of a batch": lambda f, x, p: jax.grad(lambda b: loss(jax.vmap(f, (0, None)), b, p))(jnp.stack([x, x])),
    "batch of derivatives": lambda f, x, p: jax.vmap(jax.grad(lambda b: loss(f, b, p)))(jnp.stack([x, x + 1])),
    "checkpoint": lambda f, x, p: jax.grad(lambda b: loss(jax.checkpoint(f), b, p))(x),
    "bfloat16": lambda f, x, p: f(x.astype(jnp.bfloat16), p),
    "one row": lambda f, x, p: f(x[0], p),
    "no rows": lambda f, x, p: f(x[:0], p),
}


@needs_library
@pytest.mark.parametrize("leaf", MASKED_LEAVES)
@pytest.mark.parametrize("kernel", ["native_expansion", "native_sparse"])
@pytest.mark.parametrize("name", MASKED_TRANSFORMED)
def test_transformations_of_products_with_masked_weights(name, leaf, kernel):
    kernel, plain, x, floats = masked_problem(leaf, kernel=kernel)
    actual, expected = (jax.jit(functools.partial(MASKED_TRANSFORMED[name], f)) for f in (kernel, plain))
    assert (
        "jaxcompress_" in actual.lower(x, floats).as_text(),
        "jaxcompress_" in expected.lower(x, floats).as_text(),
    ) == (True, False)
    assert_close(actual(x, floats), expected(x, floats))


@needs_library
@pytest.mark.parametrize("leaf", MASKED_LEAVES)
def test_stacks_of_masked_weights(leaf):
    stacked = {"w": MASKED_LEAVES[leaf](np.random.default_rng(8), (3,), 1)}
    xs = jnp.asarray(np.random.default_rng(9).normal(size=(3, 5, 16)), jnp.float32)
    run, plain = (jc.execute(lambda p, x: x @ p["w"], kernels=kernels) for kernels in (("native_expansion",), ()))

    def scanned(run, params, xs):
        return jax.lax.scan(lambda total, own: (total + 1, run(*own)), 0.0, (params, xs))[1]

    def over_batches(run, params, xs):
        return jax.vmap(run)(params, xs)

    def batched_product(run, params, xs):
        return run(params, xs)

    for way in (scanned, over_batches, batched_product):
        assert_close(jax.jit(functools.partial(way, run))(stacked, xs), way(plain, stacked, xs))


@needs_library
@pytest.mark.parametrize("kernels", [None, ("native_expansion",)])
def test_either_side_and_orientation_of_masked_weights(kernels):
    leaf = masked(np.random.default_rng(10), (16, 24))
    several = masked(np.random.default_rng(11), (4, 4, 3, 8))
    x = jnp.asarray(np.random.default_rng(12).normal(size=(5, 16)), jnp.float32)
    wide = jnp.asarray(np.random.default_rng(13).normal(size=(5, 24)), jnp.float32)
    for apply, w, inputs in (
        (lambda w, x: x @ w, leaf, x),
        (lambda w, x: jnp.einsum("ni,oi->no", x, w), leaf, wide),
        (lambda w, x: jnp.einsum("io,ni->on", w, x), leaf, x),
        (lambda w, x: jnp.einsum("nab,abcd->ncd", x.reshape(-1, 4, 4), w), several, x),
    ):
        is_matrix = kernels is None and w is leaf
        expected = "native_sparse" if is_matrix else "native_expansion"
        assert jc.execution.plan(apply, w, inputs, kernels=kernels).matmuls[0].kernel == expected
        run = jax.jit(jc.execute(apply, kernels=kernels))
        (assert_close if is_matrix else assert_same_bits)(run(w, inputs), jax.jit(apply)(w.materialize(), inputs))


@needs_library
@pytest.mark.parametrize("kernel", ["native_expansion", "native_sparse"])
@pytest.mark.parametrize("leaf", MASKED_LEAVES)
def test_exported_programs_hold_the_plain_expansion(leaf, kernel):
    kernel, plain, x, floats = masked_problem(leaf, kernel=kernel)
    exported = jax.export.export(jax.jit(kernel))(x, floats)
    assert "jaxcompress_" not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(x, floats), plain(x, floats), rtol=1e-5, atol=1e-5)


@needs_library
@pytest.mark.parametrize("kernels", [None, ("native_expansion",)], ids=str)
@pytest.mark.parametrize("spec", [P("a"), P(), P(None)], ids=str)
@pytest.mark.parametrize("leaf", MASKED_LEAVES)
def test_masked_weights_on_8_devices(leaf, spec, kernels, mesh):
    # One run of rows for each device would not fill bytes; columns are free.
    spec = P(None, "a") if spec == P("a") and leaf in ("2:4", "codes 2:4") else spec
    _, plain, x, floats = masked_problem(leaf, shards=4)
    params = {"w": MASKED_LEAVES[leaf](np.random.default_rng(6), (), 4)}
    placed = jc.arrays.component_shardings(params["w"], NamedSharding(mesh, spec))
    spread = {"w": jax.device_put(params["w"], placed)}
    run = jax.jit(jc.execute(lambda p, x: x @ p["w"], kernels=kernels))
    for of_rows in (P(), P("b"), P(None, "a")):
        inputs = jax.device_put(jnp.concatenate([x, x[:3]]), NamedSharding(mesh, of_rows))
        program = run.lower(spread, inputs).compile()
        # Each device expands the rows that it has, and multiplies the inputs that belong to them.
        if (spec, of_rows) == (P("a"), P(None, "a")):
            assert "all-gather" not in str(program.as_text())
        assert_close(program(spread, inputs)[:5], plain(x, floats))
    gradient = jax.jit(jax.grad(lambda x: loss(run, spread, x)))(jax.device_put(x, NamedSharding(mesh, P())))
    assert_close(gradient, jax.grad(lambda x: loss(plain, x, floats))(x))


@needs_library
@pytest.mark.parametrize("leaf", MASKED_LEAVES)
def test_masked_weights_on_explicit_axes(leaf):
    _, plain, x, floats = masked_problem(leaf)
    params = {"w": MASKED_LEAVES[leaf](np.random.default_rng(6), (), 1)}
    rows = jax.device_put(jnp.tile(x, (8, 1)), NamedSharding(jax.make_mesh((8,), ("a",)), P("a")))
    y = jax.jit(lambda x: jc.execute(lambda p, x: x @ p["w"])(params, x))(rows)
    assert y.sharding.spec[0] == "a"
    assert_close(np.asarray(y)[:5], plain(x, floats))


@needs_library
@pytest.mark.parametrize("leaf", MASKED_LEAVES)
def test_masked_weights_inside_shard_map(leaf, mesh):
    kernel, plain, x, floats = masked_problem(leaf)
    rows = jnp.tile(x, (4, 1))

    def mapped(f):
        return jax.shard_map(f, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"))

    assert_close(jax.jit(mapped(kernel))(rows, floats), plain(rows, floats))
    actual = jax.jit(jax.grad(functools.partial(loss, mapped(kernel)), (0, 1)))(rows, floats)
    assert_close(actual, jax.grad(functools.partial(loss, plain), (0, 1))(rows, floats))


@needs_library
def test_rows_do_not_depend_on_one_another():
    leaf = {"w": masked(np.random.default_rng(14), (64, 48))}
    x = jnp.asarray(np.random.default_rng(15).normal(size=(40, 64)), jnp.float32)
    x = x.at[3, 5].set(jnp.nan)
    run = jax.jit(jc.execute(lambda p, x: x @ p["w"]))
    whole = np.asarray(run(leaf, x))
    assert np.isnan(whole[3]).all()
    assert np.isfinite(np.delete(whole, 3, axis=0)).all()
    for rows, kernel in ((1, "native_sparse"), (8, "native_sparse"), (9, "native_expansion"), (40, "native_expansion")):
        assert jc.execution.plan(lambda p, x: x @ p["w"], leaf, x[:rows]).matmuls[0].kernel == kernel
        np.testing.assert_allclose(run(leaf, x[:rows]), whole[:rows], rtol=1e-4, atol=1e-5)


@needs_library
def test_more_rows_multiply_piece_by_piece_where_plain_weights_leave_the_cache():
    mask = jnp.zeros((2050, 2048), bool).at[:, 0].set(True)
    leaf = {"w": sparsify(jnp.ones(mask.shape), mask)}

    def kernel(rows):
        x = jnp.ones((rows, 2050))
        return jc.execution.plan(lambda p, x: x @ p["w"], leaf, x).matmuls[0].kernel

    assert [kernel(rows) for rows in (9, 128, 129)] == ["native_sparse", "native_sparse", "native_expansion"]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 2050)), jnp.float32)
    y = jax.jit(jc.execute(lambda p, x: x @ p["w"]))(leaf, x)
    np.testing.assert_allclose(y[:, 0], x.sum(1), rtol=1e-4, atol=1e-4)
    assert (y[:, 1:] == 0).all()


@needs_library
def test_what_the_expansion_refuses():
    def refused(leaf):
        parameters = {"dimension_numbers": (((1,), (0,)), ((), ())), "preferred_element_type": None}
        other = jnp.ones((1, leaf.shape[0]))
        return EXPANSION.why_not(Matmul(leaf=leaf, other=other, side=1, parameters=parameters))

    rng = np.random.default_rng(16)
    assert refused(masked(rng, (8, 4))) is None
    assert refused(masked(rng, (0, 4))) == refused(masked(rng, (8, 0))) == "there are no weights"
    assert "values are int8" in str(refused(masked_codes(rng, (8, 4), (1, 1), bits=8).data))
    dense, _ = jc.quantization.quantize({"w": jnp.ones((8, 4))}, jc.quantization.QuantSpec(bits=8))
    assert refused(dense["w"]) == "weights are not stored sparsely"


def test_without_a_library_masked_weights_multiply_by_themselves(monkeypatch):
    monkeypatch.setattr(
        choice,
        "KERNELS",
        tuple(
            dataclasses.replace(kernel, missing=lambda: "no library") if kernel.name.startswith("native") else kernel
            for kernel in choice.KERNELS
        ),
    )
    leaf, x = masked(np.random.default_rng(17), (8, 4)), jnp.ones((2, 8))
    (matmul,) = jc.execution.plan(lambda p, x: x @ p["w"], {"w": leaf}, x, platform="cpu").matmuls
    assert (matmul.kernel, matmul.refused["native_expansion"]) == ("plain", "no library")
    assert_close(jc.execute(lambda p, x: x @ p["w"])({"w": leaf}, x), x @ leaf.materialize())


@needs_library
def test_formats_of_masks_check_themselves():
    with pytest.raises(ValueError, match="`levels`"):
        SparseFormat(rows=2, columns=3, levels=(0.0, 1.0))


@pytest.mark.parametrize("shape", [(0, 5), (4, 0)], ids=str)
def test_products_with_empty_masked_weights(shape):
    leaf, x = masked(np.random.default_rng(18), shape), jnp.ones((3, shape[0]))
    y = jax.jit(jc.execute(lambda p, x: x @ p["w"]))({"w": leaf}, x)
    np.testing.assert_array_equal(y, np.zeros((3, shape[1])))
