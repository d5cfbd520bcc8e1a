"""The choice among implementations of products, and that each computes what it replaces."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from optimized import OPTIONS

import jaxcompress as jc
from jaxcompress._src.execution.kernels import choice, native_cpu
from jaxcompress._src.execution.kernels.native import library
from jaxcompress.arrays import QuantizedArray
from jaxcompress.quantization import QuantSpec, quantize, quantize_inputs

INT8 = QuantSpec(bits=8)
SPECS = {
    "int8": INT8,
    "uint8": QuantSpec(bits=8, symmetric=False),
    "int8 groups": QuantSpec(bits=8, group_size=16),
    "int4 groups": QuantSpec(bits=4, group_size=16, scale_dtype="bfloat16"),
    "uint4 groups": QuantSpec(bits=4, group_size=32, symmetric=False),
    "nf4": QuantSpec(format="nf4", group_size=32),
}
INPUTS = {"float inputs": None, "int8 inputs": INT8, "uint8 inputs": QuantSpec(bits=8, symmetric=False)}
# A kernel (in, out), a table (out, in), and a kernel with several axes on both sides.
MODELS = {
    "inputs first": ((96, 40), lambda p, x: x @ p["w"]),
    "outputs first": ((40, 96), lambda p, x: x @ p["w"].T),
    "several axes": (
        (3, 32, 4, 10),
        lambda p, x: jnp.einsum("...ab,abcd->...cd", x.reshape(*x.shape[:-1], 3, 32), p["w"]),
    ),
    "on the left": ((96, 40), lambda p, x: jnp.einsum("io,...i->o...", p["w"], x)),
}
needs_library = pytest.mark.skipif(library.why_missing() is not None, reason=f"no kernels: {library.why_missing()}")


@pytest.fixture(autouse=True)
def _one_processor(monkeypatch):
    """Choices are those for AVX-512 VNNI without AMX, whatever this machine has; products run by what it has."""
    monkeypatch.setattr(native_cpu, "instruction_sets", lambda: ("avx2", "avx512_vnni"))
    monkeypatch.setattr(native_cpu.library, "instruction_set", lambda: "avx512vnni")


def _problem(model, weights, inputs=None, rows=3):
    shape, apply = MODELS[model]
    rng = np.random.default_rng(len(shape) + rows)
    plain = {"w": jnp.asarray(rng.normal(size=shape), jnp.float32)}
    layouts = jc.trace.layouts(apply, plain, jnp.zeros((rows, 96)))
    params, _ = quantize(plain, SPECS[weights], layouts=layouts)
    if INPUTS.get(inputs) is not None:
        params, _ = quantize_inputs(params, INPUTS[inputs], layouts=layouts)
    return apply, params, jnp.asarray(rng.normal(size=(rows, 96)), jnp.float32)


@pytest.mark.parametrize("rows", [1, 3, 8, 40])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weights", SPECS)
@pytest.mark.parametrize("model", MODELS)
def test_what_is_chosen_computes_what_the_array_does_by_itself(model, weights, inputs, rows):
    apply, params, x = _problem(model, weights, inputs, rows)
    wanted = jax.jit(jc.execute(apply, kernels=()))(params, x)
    np.testing.assert_allclose(jax.jit(jc.execute(apply))(params, x), wanted, rtol=1e-4, atol=1e-4)
    if inputs == "float inputs":
        np.testing.assert_allclose(wanted, apply(jc.materialize(params), x), rtol=1e-4, atol=1e-4)


@needs_library
@pytest.mark.parametrize(
    ("weights", "inputs", "rows", "kernel"),
    [
        ("int8", "float inputs", 3, "native_float"),
        ("uint4 groups", "float inputs", 3, "native_float"),
        ("nf4", "float inputs", 3, "native_float"),
        ("int8", "float inputs", 40, "plain"),
        ("int8", "int8 inputs", 3, "native_int8"),
        ("uint8", "uint8 inputs", 40, "native_int8"),
        ("int8 groups", "int8 inputs", 40, "native_int8_groups"),
        ("int4 groups", "int8 inputs", 3, "native_int8_groups"),
        ("uint4 groups", "int8 inputs", 40, "native_int8_groups"),
        ("uint4 groups", "uint8 inputs", 40, "native_int8_groups"),
    ],
)
@pytest.mark.parametrize("model", ["inputs first", "outputs first"])
def test_the_plan_says_what_runs(model, weights, inputs, rows, kernel):
    apply, params, x = _problem(model, weights, inputs, rows)
    plan = jc.execution.plan(apply, params, x, platform="cpu")
    assert [each.kernel for each in plan.matmuls] == [kernel]
    (matmul,) = plan.matmuls
    assert (matmul.path, matmul.rows, matmul.inputs, matmul.outputs) == ("w", rows, 96, 40)
    text = jax.jit(jc.execute(apply)).lower(params, x).as_text()
    assert ("jaxcompress_" in text) == (kernel != "plain")
    if kernel == "plain":
        assert matmul.refused["native_float"] == "40 rows: for up to 32 at 8 bits"
    assert f"{rows} x 96 x 40" in str(plan)
    assert kernel in str(plan)


@needs_library
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("ranges", ["dynamic", "static"])
@pytest.mark.parametrize("inputs", ["int8 inputs", "uint8 inputs"])
@pytest.mark.parametrize("weights", ["int8 groups", "int4 groups", "uint4 groups"])
@pytest.mark.parametrize("model", MODELS)
def test_whole_numbers_by_groups(model, weights, inputs, ranges, rows):
    apply, params, x = _problem(model, weights, inputs, rows)
    if ranges == "static":
        zero = jnp.uint8(90) if inputs == "uint8 inputs" else None
        params = {"w": choice.dataclasses.replace(params["w"], scale=jnp.float32(0.02), zero_point=zero)}
    names = ("native_int8_groups",)
    assert jc.execution.plan(apply, params, x, kernels=names).matmuls[0].kernel == names[0]
    wanted = jc.execute(apply, kernels=())(params, x)
    np.testing.assert_allclose(jc.execute(apply, kernels=names)(params, x), wanted, rtol=1e-5, atol=1e-5)


@needs_library
def test_what_is_not_summed_as_whole_numbers_by_groups():
    def refused(weights, inputs):
        apply, params, x = _problem("inputs first", weights, inputs)
        matmul, *_ = jc.execution.plan(apply, params, x, kernels=("native_int8_groups",)).matmuls
        assert matmul.kernel == "plain"
        return matmul.refused["native_int8_groups"]

    assert refused("int4 groups", "float inputs") == "inputs are not quantized"
    assert refused("nf4", "int8 inputs") == "weights are no integer codes with scales"


@needs_library
def test_learned_zero_points_of_inputs_are_no_whole_numbers():
    apply, params, x = _problem("inputs first", "int4 groups", "uint8 inputs")

    class Learned:
        def rounded(self, x, axes, scale, zero_point):
            return x

        def codes(self, x, axes, scale, zero_point):
            one = jnp.ones((1,) * x.ndim)
            return QuantizedArray(data=x.astype(jnp.uint8), scale=one, dtype=x.dtype, zero_point=0.5 * one)

    params = {"w": choice.dataclasses.replace(params["w"], inputs=Learned())}
    matmul, *_ = jc.execution.plan(apply, params, x, kernels=("native_int8_groups",)).matmuls
    assert matmul.refused["native_int8_groups"] == "zero points of inputs are no whole numbers"


@needs_library
@pytest.mark.parametrize("weights", SPECS)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("model", ["inputs first", "outputs first"])
@pytest.mark.parametrize("rows", [6, 40])
def test_inputs_that_are_not_finite_are_those_of_the_plain_product(model, inputs, weights, rows):
    apply, params, x = _problem(model, weights, inputs, rows)
    x = np.array(x)
    x[1, 5], x[2, 7], x[3, 20], x[4, [1, 2]] = np.nan, np.inf, -np.inf, (np.inf, -np.inf)
    found, by_itself = (jax.jit(jc.execute(apply, kernels=names))(params, x) for names in (None, ()))
    plain = by_itself if inputs != "float inputs" else apply(jc.materialize(params), x)
    np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(by_itself, plain, rtol=1e-4, atol=1e-4)
    assert np.isfinite(plain[0]).all()
    assert np.isnan(plain[1]).all()


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weights", SPECS)
def test_a_kernel_is_chosen_once_outside_of_jit(weights, inputs, monkeypatch):
    apply, params, x = _problem("inputs first", weights, inputs)
    choices = []
    described = choice._described
    monkeypatch.setattr(choice, "_described", lambda *args: choices.append(1) or described(*args))
    choice._compiled_once.cache_clear()
    first = jc.execute(apply)(params, x)
    count = len(choices)
    np.testing.assert_array_equal(jc.execute(apply)(params, x), first)
    np.testing.assert_array_equal(jc.execute(apply)(params, np.asarray(x)), first)
    assert len(choices) == count
    np.testing.assert_allclose(jax.jit(jc.execute(apply))(params, x), first, rtol=1e-6, atol=1e-6)
    jc.execute(apply)(params, x[:2])
    assert len(choices) == 3 * count  # of the first call, of `jit`, and of two rows


@needs_library
def test_what_was_chosen_outside_of_jit_is_chosen_anew_for_another_processor(monkeypatch):
    apply, params, x = _problem("inputs first", "int8", "int8 inputs", rows=40)
    exact = jc.execute(apply)(params, x)
    compiled = choice._compiled_once.cache_info().currsize
    monkeypatch.setattr(choice, "instruction_sets", lambda: ("amx_int8",))
    np.testing.assert_array_equal(jc.execute(apply)(params, x), exact)
    assert choice._compiled_once.cache_info().currsize == compiled + 1


def test_static_fields_that_cannot_be_looked_up_are_chosen_for_anew():
    apply, params, x = _problem("inputs first", "int8", "int8 inputs")

    class Unhashable:
        __hash__ = None

        def __getattr__(self, name):
            return getattr(params["w"].inputs, name)

    own = {"w": choice.dataclasses.replace(params["w"], inputs=Unhashable())}
    np.testing.assert_allclose(jc.execute(apply)(own, x), jc.execute(apply)(params, x), rtol=1e-6, atol=1e-6)


def test_without_kernels_there_is_nothing_but_the_product():
    apply, params, x = _problem("inputs first", "int4 groups")
    plan = jc.execution.plan(apply, params, x, kernels=())
    assert plan.matmuls[0].kernel == "plain"
    assert "no other kernel was asked for" in str(plan)
    jaxpr = str(jax.make_jaxpr(jc.execute(apply, kernels=()))(params, x))
    assert not re.search("zero_when_ready|unless_exported|ffi_call", jaxpr)


def test_kernels_that_cannot_be_had_are_named(monkeypatch):
    apply, params, x = _problem("inputs first", "int8")
    with pytest.raises(ValueError, match=r"There is no kernel 'fast'; there are native_int8, .*, plain\."):
        jc.execute(apply, kernels=("fast",))
    with pytest.raises(ValueError, match=r"write \('native_float',\)"):
        jc.execute(apply, kernels="native_float")
    with pytest.raises(ValueError, match="`platform` must be 'cpu', 'gpu' or 'tpu', got 'amiga'"):
        jc.execution.plan(apply, params, x, platform="amiga")
    without = tuple(
        kernel if not kernel.name.startswith("native") else choice.dataclasses.replace(kernel, missing=lambda: "gone")
        for kernel in choice.KERNELS
    )
    monkeypatch.setattr(choice, "KERNELS", without)
    with pytest.raises(ValueError, match="Kernel 'native_float' cannot run here: gone"):
        jc.execute(apply, kernels=("native_float",))
    plan = jc.execution.plan(apply, params, x)
    assert plan.matmuls[0].kernel == "plain"
    assert plan.matmuls[0].refused["native_float"] == "gone"
    assert "gone (native_int8, native_int8_groups, native_float, native_sparse, native_expansion)" in str(plan)
    np.testing.assert_allclose(jc.execute(apply)(params, x), apply(jc.materialize(params), x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "kernel"),
    [("inputs first", "rounded_floats"), ("outputs first", "int8_padded"), ("on the left", "rounded_floats")],
)
def test_few_rows_of_whole_numbers_in_plain_jax(model, kernel):
    apply, params, x = _problem(model, "int8", "int8 inputs")
    names = ("int8_padded", "rounded_floats")
    assert jc.execution.plan(apply, params, x, kernels=names).matmuls[0].kernel == kernel
    wanted = jc.execute(apply, kernels=())(params, x)
    np.testing.assert_allclose(jc.execute(apply, kernels=names)(params, x), wanted, rtol=1e-5, atol=1e-5)


def test_a_symbolic_number_of_rows_may_be_any():
    apply, params, _ = _problem("inputs first", "int8", "int8 inputs")
    (rows,) = jax.export.symbolic_shape("rows")
    x = jax.ShapeDtypeStruct((rows, 96), jnp.float32)
    (matmul,) = jc.execution.plan(apply, params, x).matmuls
    assert matmul.kernel == "plain"
    assert set(matmul.refused.values()) <= {"the number of rows is symbolic: rows"}
    exported = jax.export.export(jax.jit(jc.execute(apply)))(params, x)
    for count in (1, 20):
        x = jnp.ones((count, 96))
        np.testing.assert_allclose(exported.call(params, x), jc.execute(apply)(params, x), rtol=1e-5, atol=1e-5)


@needs_library
@pytest.mark.parametrize("inputs", ["float inputs", "int8 inputs"])
def test_exported_programs_call_no_library(inputs):
    apply, params, x = _problem("inputs first", "int8", inputs)
    run = jax.jit(jc.execute(apply))
    assert "jaxcompress_" in run.lower(params, x).as_text()
    exported = jax.export.export(run)(params, x)
    assert "jaxcompress_" not in exported.mlir_module()
    back = jax.export.deserialize(exported.serialize())
    np.testing.assert_allclose(back.call(params, x), run(params, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weights", ["int8", "int4 groups", "uint4 groups"])
def test_derivatives_are_those_of_the_array(weights, inputs):
    apply, params, x = _problem("inputs first", weights, inputs)
    floats, rest = jc.tree.partition_trainable(params)

    def gradients(kernels):
        run = jc.execute(apply, kernels=kernels)
        return jax.jit(jax.grad(lambda f, x: (run(jc.tree.combine(f, rest), x) ** 2).sum(), argnums=(0, 1)))(floats, x)

    for actual, wanted in zip(jax.tree.leaves(gradients(None)), jax.tree.leaves(gradients(())), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-3, atol=1e-3 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize("inputs", ["float inputs", "int8 inputs"])
@pytest.mark.parametrize("weights", ["int8", "int4 groups"])
def test_under_vmap_and_scan(weights, inputs):
    apply, params, x = _problem("inputs first", weights, inputs)
    run, wanted = (jc.execute(apply, kernels=kernels) for kernels in (None, ()))
    several = jnp.stack([x, 2 * x])

    def through_scan(fn, params, xs):
        return jax.lax.scan(lambda carry, x: (carry, fn(params, x)), 0, xs)[1]

    for way in (
        lambda fn: jax.vmap(functools.partial(fn, params)),
        lambda fn: functools.partial(through_scan, fn, params),
    ):
        np.testing.assert_allclose(jax.jit(way(run))(several), way(wanted)(several), rtol=1e-4, atol=1e-4)
    stacked = jax.tree.map(lambda part: jnp.stack([part, part]), params)
    by_layer = (jax.jit(lambda p, x, fn=fn: jax.lax.scan(lambda x, p: (x, fn(p, x)), x, p)[1]) for fn in (run, wanted))
    actual, expected = (fn(stacked, x) for fn in by_layer)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inputs", ["float inputs", "int8 inputs"])
@pytest.mark.parametrize("spec", [PartitionSpec(None, "x"), PartitionSpec("x"), PartitionSpec()])
def test_on_eight_devices(spec, inputs):
    apply, params, x = _problem("inputs first", "int8", inputs, rows=8)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    wanted = jc.execute(apply, kernels=())(params, x)
    shardings = jax.tree.map(
        lambda leaf: jc.arrays.component_shardings(leaf, NamedSharding(mesh, spec)),
        params,
        is_leaf=lambda leaf: hasattr(leaf, "materialize"),
    )
    spread = jax.device_put(params, shardings)
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("x" if spec == PartitionSpec() else None)))
    np.testing.assert_allclose(jax.jit(jc.execute(apply))(spread, x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("leaf", ["int8", "int4 groups", "2:4"])
def test_weights_are_widened_one_after_the_other(leaf):
    """All at once they would take as much memory as the dense model."""
    width, layers = 256, 8
    plain = {f"layer_{i}": jax.random.normal(jax.random.key(i), (width, width)) / 16 for i in range(layers)}
    if leaf == "2:4":
        masks = jc.pruning.masks_from_scores(
            jc.pruning.magnitude_scores(plain), sparsity=0.5, pattern=jc.pruning.n_of_m(2, 4)
        )
        params = jax.tree.map(lambda w, m: jc.arrays.sparsify(w * m, m, pattern=(2, 4), axis=0), plain, masks)
    else:
        params, _ = quantize(plain, SPECS[leaf])

    def apply(params, x):
        for i in range(layers):
            x = jnp.tanh(x @ params[f"layer_{i}"])
        return x

    x = jnp.ones((64, width))
    compiled = jax.jit(jc.execute(apply)).lower(params, x).compile(OPTIONS)
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 4 * width**2
    np.testing.assert_allclose(compiled(params, x), apply(jc.materialize(params), x), rtol=1e-3, atol=1e-4)


@needs_library
def test_a_transposed_table_is_multiplied_as_it_is_stored():
    apply, params, x = _problem("outputs first", "int4 groups")
    (matmul,) = jc.execution.plan(apply, params, x).matmuls
    assert matmul.kernel == "native_float"
    text = jax.jit(jc.execute(apply)).lower(params, x).as_text()
    # The kernel takes the bytes of the leaf, which nothing rearranges before.
    assert "40x48xui8" in text.partition("custom_call @jaxcompress_weight_only")[2].splitlines()[0]


def test_transposes_that_change_nothing_and_twice():
    apply = lambda p, x: x @ jnp.transpose(p["w"], (0, 1)).T.T  # noqa: E731
    _, params, x = _problem("inputs first", "int8")
    np.testing.assert_allclose(jc.execute(apply)(params, x), apply(jc.materialize(params), x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", ["inputs first", "outputs first", "several axes", "on the left"])
@pytest.mark.parametrize("weights", ["int8 groups", "int4 groups", "uint4 groups", "nf4"])
def test_weights_rounded_once_more(model, weights):
    apply, params, x = _problem(model, weights, "int8 inputs", rows=40)
    names = ("requantized_int8",)
    assert jc.execution.plan(apply, params, x, kernels=names, platform="cpu").matmuls[0].kernel == "requantized_int8"
    run, wanted = (jax.jit(jc.execute(apply, kernels=kernels)) for kernels in (names, ()))
    actual, expected = run(params, x), wanted(params, x)
    assert 0 < jnp.linalg.norm(actual - expected) <= 0.01 * jnp.linalg.norm(expected)
    # What it states: every weight moves by at most 1/254 of the largest one of its output.
    plain = jc.materialize(params)["w"]
    largest = jnp.abs(plain).max() / 254
    bound = jnp.abs(x).sum(-1).max() * largest * 1.02
    assert float(jnp.abs(actual - expected).max()) <= float(bound)
    floats, rest = jc.tree.partition_trainable(params)
    gradients = [jax.grad(lambda f, fn=fn: (fn(jc.tree.combine(f, rest), x)).sum())(floats) for fn in (run, wanted)]
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3 * float(jnp.abs(other).max()))


def test_exact_products_are_not_rounded_once_more():
    apply, params, x = _problem("inputs first", "int8", "int8 inputs", rows=40)
    (matmul,) = jc.execution.plan(apply, params, x, kernels=("requantized_int8",)).matmuls
    assert (matmul.kernel, matmul.refused) == ("plain", {"requantized_int8": "sums are exact"})


@needs_library
@pytest.mark.parametrize("weights", SPECS)
def test_results_wider_than_the_inputs_are_not_rounded_to_them(weights):
    def apply(p, x):
        kernel = p["w"].astype(x.dtype)
        return jax.lax.dot_general(x, kernel, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    _, params, x = _problem("inputs first", weights)
    x = x.astype(jnp.bfloat16)
    assert jc.execution.plan(apply, params, x, platform="cpu").matmuls[0].kernel == "native_float"
    wanted = np.asarray(x, np.float64) @ np.asarray(jc.materialize(params)["w"], np.float64)
    result = jax.jit(jc.execute(apply))(params, x)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-5)


@needs_library
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weights", SPECS)
def test_float64_results_of_float32_inputs_have_float64_sums(weights, inputs):
    apply, params, x = _problem("inputs first", weights, inputs)
    wider = lambda p, x: apply({"w": p["w"].astype("float64")}, x)  # noqa: E731
    with jax.enable_x64(True):
        wanted = jc.execute(wider, kernels=())(params, x)
        result = jax.jit(jc.execute(wider))(params, x)
    assert result.dtype == wanted.dtype == jnp.float64
    np.testing.assert_allclose(result, wanted, rtol=1e-12, atol=1e-12)


def test_kernels_that_round_to_the_inputs_refuse_wider_results():
    params, _ = quantize({"w": jnp.ones((256, 128))}, INT8)
    x = jnp.ones((8, 256), jnp.bfloat16)

    def refused(dtype):
        def apply(p, x):
            return jnp.dot(x, p["w"].astype(x.dtype), preferred_element_type=dtype)

        return jc.execution.plan(apply, params, x, kernels=("tpu_int8",), platform="tpu").matmuls[0].refused

    assert refused(None) == {}
    assert refused(jnp.float32) == {"tpu_int8": "results are float32, more than the bfloat16 of the inputs"}


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weights", ["int8", "uint8"])
def test_sums_over_nothing(weights, inputs):
    apply, tree, x = (lambda p, x: x @ p["w"]), {"w": jnp.zeros((0, 5))}, jnp.zeros((3, 0))
    layouts = jc.trace.layouts(apply, tree, x)
    params, _ = quantize(tree, SPECS[weights], layouts=layouts)
    if INPUTS[inputs] is not None:
        params, _ = quantize_inputs(params, INPUTS[inputs], layouts=layouts)
    np.testing.assert_array_equal(jax.jit(jc.execute(apply))(params, x), np.zeros((3, 5)))


@pytest.mark.parametrize("kernels", [None, ()], ids=str)
@pytest.mark.parametrize("inputs", ["int8 inputs", "uint8 inputs"])
@pytest.mark.parametrize("weights", ["int8", "int8 groups", "nf4"])
def test_second_derivatives_are_those_of_the_product(weights, inputs, kernels):
    apply, params, x = _problem("inputs first", weights, inputs, rows=1)
    run = jc.execute(apply, kernels=kernels)
    hessian = jax.hessian(lambda x: jnp.sin(run(params, x)).sum())(x)
    w, y = np.asarray(jc.materialize(params)["w"]), np.asarray(run(params, x))
    np.testing.assert_allclose(hessian[0, :, 0, :], -(w * np.sin(y)) @ w.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", ["int32", "int8", "bool"])
@pytest.mark.parametrize("weights", SPECS)
def test_inputs_that_are_whole_numbers_are_quantized_too(weights, dtype):
    apply, params, x = _problem("inputs first", weights, "int8 inputs")
    x = (3 * x).astype(dtype)
    result = jax.jit(jc.execute(apply))(params, x)
    np.testing.assert_allclose(result, jc.execute(apply)(params, x.astype(jnp.float32)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inputs", ["float inputs", "int8 inputs"])
@pytest.mark.parametrize("weights", ["int8", "int4 groups", "nf4"])
def test_within_shard_map(weights, inputs):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    apply, params, x = _problem("inputs first", weights, inputs, rows=8)
    wanted = jc.execute(apply, kernels=())(params, x)
    columns = jc.arrays.component_shardings(params["w"], NamedSharding(mesh, PartitionSpec(None, "model")))
    for specs, out in (
        (PartitionSpec(), PartitionSpec("data")),
        ({"w": jax.tree.map(lambda each: each.spec, columns)}, PartitionSpec("data", "model")),
    ):

        def mapped(x, specs=specs, out=out):
            mapping = {"mesh": mesh, "in_specs": (specs, PartitionSpec("data")), "out_specs": out}
            return jax.shard_map(jc.execute(apply), **mapping)(params, x)

        np.testing.assert_allclose(jax.jit(mapped)(x), wanted, rtol=1e-4, atol=1e-4)
        gradient = jax.jit(jax.grad(lambda x, mapped=mapped: jnp.sin(mapped(x)).sum()))(x)
        plain = jax.grad(lambda x: jnp.sin(jc.execute(apply, kernels=())(params, x)).sum())(x)
        np.testing.assert_allclose(gradient, plain, rtol=1e-3, atol=1e-3)


@needs_library
def test_other_processors_choose_otherwise(monkeypatch):
    apply, params, x = _problem("inputs first", "int8", "int8 inputs", rows=40)
    one_row = _problem("inputs first", "int8", "int8 inputs", rows=1)
    grouped = _problem("inputs first", "int8 groups", "int8 inputs", rows=40)
    monkeypatch.setattr(native_cpu, "instruction_sets", lambda: ("amx_int8",))
    (matmul,) = jc.execution.plan(apply, params, x, platform="cpu").matmuls
    assert (matmul.kernel, "by AMX" in matmul.refused["native_int8"]) == ("plain", True)
    assert jc.execution.plan(*one_row, platform="cpu").matmuls[0].kernel == "native_int8"
    monkeypatch.setattr(native_cpu, "instruction_sets", lambda: ("avx2",))
    monkeypatch.setattr(native_cpu.library, "instruction_set", lambda: "avx2")
    assert jc.execution.plan(apply, params, x, platform="cpu").matmuls[0].kernel == "native_int8"
    assert jc.execution.plan(*one_row, platform="cpu").matmuls[0].kernel == "native_int8"
    matmul = jc.execution.plan(*grouped, platform="cpu").matmuls[0]
    assert "by AVX2 alone" in matmul.refused["native_int8_groups"]
    for problem in (one_row, grouped):
        wanted = jc.execute(problem[0], kernels=())(*problem[1:])
        np.testing.assert_allclose(jc.execute(problem[0])(*problem[1:]), wanted, rtol=1e-4, atol=1e-4)
