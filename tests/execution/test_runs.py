"""Stacks in runs of layers: selected, compressed and executed run by run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import trace
from jaxcompress._src.execution.execute import fallbacks
from jaxcompress._src.tree.maps import leaf_paths
from jaxcompress.calibration import input_statistics
from jaxcompress.pruning import wanda
from jaxcompress.quantization import QuantSpec, gptq, quantize
from jaxcompress.tree import by_path, join_stacks, split_stacks

LAYERS, WIDTH = 12, 8


def _apply(params, x, *, reverse=False, unroll=1, cast=False):
    def layer(x, own):
        kernel, bias = own
        return jnp.tanh(x.astype(kernel.dtype) @ kernel).astype(x.dtype) + bias[None], x.sum()

    kernels = params["kernel"].astype(jnp.bfloat16) if cast else params["kernel"]
    x, sums = jax.lax.scan(layer, x, (kernels, params["bias"]), reverse=reverse, unroll=unroll)
    return x @ params["head"], sums


def _params():
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape) / 3, jnp.float32)  # noqa: E731
    return {"kernel": make(LAYERS, WIDTH, WIDTH), "bias": make(LAYERS, WIDTH), "head": make(WIDTH, 3)}


X = jnp.asarray(np.random.default_rng(1).normal(size=(5, WIDTH)), jnp.float32)
AT = (1, 10, 11)
SPLIT = split_stacks(_params(), AT, select=by_path("kernel"))


def _joined(**options):
    return lambda params, x: _apply(join_stacks(params), x, **options)


def test_runs_are_leaves_in_the_order_of_layers():
    assert set(leaf_paths(SPLIT)) == {"bias", "head", *(f"kernel/{run}" for run in ("0:1", "1:10", "10:11", "11:12"))}
    # Sorted as strings, as JAX does, "10:11" comes before "1:10".
    np.testing.assert_array_equal(join_stacks(jax.tree.map(lambda x: x, SPLIT))["kernel"], _params()["kernel"])
    with pytest.raises(ValueError, match=r"`at` must ascend, between 1 and 11 for leaf 'kernel' .*got \[3, 12\]"):
        split_stacks(_params(), [3, 12], select=by_path("kernel"))
    small, _ = quantize(SPLIT, QuantSpec(bits=4), select=by_path("kernel/1:10"))
    with pytest.raises(ValueError, match=r"Leaf kernel/1:10 is compressed: run `jaxcompress.execute`"):
        join_stacks(small)
    with pytest.raises(ValueError, match="Leaf 'head' is compressed already"):
        split_stacks(quantize(_params(), QuantSpec(bits=4), select=by_path("head"))[0], [1], select=by_path("head"))


def test_statistics_of_runs_are_those_of_their_layers():
    whole = input_statistics(_apply, _params(), [(X,)])["kernel"]
    parts = input_statistics(_joined(), SPLIT, [(X,)])["kernel"]
    for run, own in parts.items():
        begin, end = map(int, run.split(":"))
        np.testing.assert_allclose(own.gram, whole.gram[begin:end], rtol=1e-6)
        np.testing.assert_array_equal(own.count, whole.count[begin:end])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("unroll", [1, 2])
@pytest.mark.parametrize("cast", [False, True])
def test_each_run_goes_through_the_scan_in_its_stored_form(reverse, unroll, cast):
    apply = _joined(reverse=reverse, unroll=unroll, cast=cast)
    small, _ = quantize(SPLIT, QuantSpec(bits=4, group_size=4), select=by_path("kernel/1:10"))
    small, _ = quantize(small, QuantSpec(bits=8), select=by_path("kernel/11:12"))
    wanted = jax.jit(apply)(jc.materialize(small), X)
    found = jax.jit(jc.execute(apply))(small, X)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=3e-2 if cast else 1e-5)
    assert fallbacks(apply, small, X) == ()


def test_single_layers_by_index_and_what_needs_the_whole():
    small, _ = quantize(SPLIT, QuantSpec(bits=4), select=by_path("kernel/1:10"))

    def indexed(params, x):
        kernels = join_stacks(params)["kernel"]
        return x @ kernels[3] @ kernels[11] + jnp.einsum("bd,ldo->blo", x, kernels[0:2]).sum(axis=1)

    np.testing.assert_allclose(jc.execute(indexed)(small, X), indexed(jc.materialize(small), X), rtol=1e-5, atol=1e-5)
    assert [note.primitive for note in fallbacks(indexed, small, X)] == ["dot_general"]
    remat = jax.checkpoint(_joined())
    np.testing.assert_allclose(jc.execute(remat)(small, X)[0], remat(jc.materialize(small), X)[0], rtol=1e-5)


def test_a_stack_that_cannot_be_cut_is_made_plain_and_noted():
    small, _ = quantize(SPLIT, QuantSpec(bits=8), select=by_path("kernel/0:1"))
    bias = quantize({"b": _params()["bias"]}, QuantSpec(bits=8, per_tensor=True), select=by_path("b"))[0]["b"]
    found = jc.execute(_joined())({**small, "bias": bias}, X)[0]
    np.testing.assert_allclose(found, _joined()(jc.materialize({**small, "bias": bias}), X)[0], rtol=1e-5, atol=1e-6)
    notes = fallbacks(_joined(), {**small, "bias": bias}, X)
    assert [(note.path, note.primitive) for note in notes] == [("bias", "add"), ("bias", "scan")]


def test_methods_select_single_layers():
    layouts = trace.layouts(_joined(), SPLIT, X)
    statistics = input_statistics(_joined(), SPLIT, [(X,)])
    first = functools.partial(by_path, r"kernel/(0:1|11:12)")
    rounded, info = gptq(SPLIT, statistics, QuantSpec(bits=3), select=first(), layouts=layouts)
    assert {path.split("[")[0] for path in info} == {"kernel/0:1", "kernel/11:12"}
    assert rounded["kernel"]["1:10"] is SPLIT["kernel"]["1:10"]
    pruned, _ = wanda(SPLIT, statistics, sparsity=0.5, select=first(), layouts=layouts)
    assert float((pruned["kernel"]["11:12"] == 0).mean()) == 0.5
    assert pruned["kernel"]["10:11"] is SPLIT["kernel"]["10:11"]
    gradient = jax.grad(lambda p: jc.execute(_joined())(p | {"kernel": rounded["kernel"]}, X)[0].sum())(
        {"bias": SPLIT["bias"], "head": SPLIT["head"]}
    )
    assert float(jnp.abs(gradient["bias"]).min()) > 0


@pytest.mark.parametrize(
    "stack",
    [
        lambda p: jnp.concatenate([jnp.concatenate([p["a"], p["b"]]), p["b"]]),
        lambda p: jnp.roll(jnp.concatenate([p["a"], p["b"]]), 1, 0),
        lambda p: jnp.roll(jnp.roll(p["a"], 1, 0), 1, 0)[:2],
        lambda p: jnp.concatenate([p["a"], p["b"]])[:0],
        lambda p: jnp.concatenate([p["a"], p["b"][:0]]),
    ],
    ids=["joined twice", "rolled", "rolled twice and cut", "nothing of it", "nothing joined to it"],
)
def test_stacks_that_are_joined_again_and_again(stack):
    rng = np.random.default_rng(3)
    params = {name: jnp.asarray(rng.normal(size=(n, 4, 4)), jnp.float32) for name, n in (("a", 3), ("b", 2))}

    def apply(p, x):
        return jax.lax.scan(lambda x, w: (x @ w / 4, None), x, stack(p))[0], stack(p)[:0].sum()

    small, x = quantize(params, QuantSpec(bits=8), select=by_path("a"))[0], jnp.ones((2, 4))
    wanted = apply(jc.materialize(small), x)
    for found, own in zip(jc.execute(apply)(small, x), wanted, strict=True):
        np.testing.assert_allclose(found, own, rtol=1e-5, atol=1e-6)


def test_places_that_are_no_numbers_runs_of_runs_and_lengths_that_contradict():
    params = {"w": jnp.ones((3, 2, 2))}
    with pytest.raises(ValueError, match="`at` must be a list of whole numbers"):
        split_stacks(params, [True], select=by_path("w"))
    split = split_stacks(params, [1], select=by_path("w"))
    with pytest.raises(ValueError, match="'w/1:3' is a run already"):
        split_stacks(split, [1], select=by_path("w/1:3"))
    with pytest.raises(ValueError, match=r"Leaf 'w/0:1' must have 1 layers, got the shape \(3, 2\)"):
        join_stacks({"w": {"0:1": jnp.ones((3, 2)), "1:3": jnp.ones((1, 2))}})
    abstract = split_stacks(jax.eval_shape(lambda: params), [1], select=by_path("w"))
    assert abstract["w"]["1:3"].shape == (2, 2, 2)
