"""A kind is one class: what it says is all that running, sharding, saving, describing and validating it takes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcompress as jc
from jaxcompress._src.arrays.protocol import (
    KINDS,
    PartCoding,
    StoredArray,
    array_kind,
    product_with_plain,
    reshape,
    slice_axis,
    transpose,
)
from jaxcompress._src.arrays.sharding import component_shardings, ones_replicated
from jaxcompress._src.arrays.static_fields import DTYPE, FLOAT
from jaxcompress._src.arrays.validate import require, validate_array
from jaxcompress.arrays import InputQuantizedArray
from jaxcompress.trace import LeafLayout, fallbacks

FLOAT32 = jnp.dtype("float32")


@array_kind()
@dataclasses.dataclass(frozen=True, eq=False)
class SquareArray(StoredArray):
    """The square of what it stores, and no more than a kind must have."""

    root: Any

    @property
    def shape(self):
        return self.root.shape

    @property
    def dtype(self):
        return self.root.dtype

    def materialize(self):
        return self.root**2


@array_kind(step=FLOAT, dtype=DTYPE, later={"step": 0.5})
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class StepsArray(StoredArray):
    """Counts of steps, with everything that a kind may say."""

    counts: Any
    dtype: Any = FLOAT32
    step: float = 0.5

    @property
    def shape(self):
        return self.counts.shape

    def materialize(self):
        return (self.step * self.counts).astype(self.dtype)

    def transpose(self, permutation):
        return dataclasses.replace(self, counts=transpose(self.counts, permutation))

    def reshape(self, shape):
        return dataclasses.replace(self, counts=reshape(self.counts, shape))

    def slice_axis(self, axis, start, size):
        return dataclasses.replace(self, counts=slice_axis(self.counts, axis, start, size))

    def cast(self, dtype):
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def can_unstack(self):
        return True

    def take_rows(self, rows):
        return dataclasses.replace(self, counts=self.counts[rows]).materialize()

    def dot(self, other, side, parameters):
        return self.step * product_with_plain(self.counts.astype(other.dtype), other, side, parameters)

    def convolve(self, inputs, parameters):
        return self.step * jax.lax.conv_general_dilated_p.bind(inputs, self.counts.astype(inputs.dtype), **parameters)

    def shardings(self, sharding):
        return dataclasses.replace(self, counts=ones_replicated(self.counts, sharding))

    def describe(self):
        return f"steps of {self.step}"

    def validate(self):
        require((np.asarray(self.counts) < 8).all(), "There are at most 7 steps.")

    def part_coding(self, name):
        assert name == "counts"
        return PartCoding(3, self.shape, lambda counts: counts, lambda counts: counts)


def counts(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 8, shape), jnp.uint8)


def square(*shape):
    return SquareArray(counts(*shape).astype(jnp.float32) / 4)


def steps(*shape):
    return StepsArray(counts=counts(*shape), step=0.25)


def model(params, x):
    """Matmuls with a kernel and a part of its transpose, a look-up, a scan over a stack, and a convolution."""
    x = x @ params["kernel"]
    x = x @ params["kernel"].T.reshape(2, 4, 8)[1].T.astype(jnp.float32)
    x = x + params["table"][jnp.array([4, 0, 2])]
    x = jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, params["stack"])[0]
    return jax.lax.conv(x.T[None], params["filter"], (1,), "SAME")


def params(make):
    return {"kernel": make(8, 8), "table": make(5, 4), "stack": make(2, 4, 4), "filter": make(2, 4, 3)}


@pytest.mark.parametrize(
    ("make", "uses"),
    [
        (steps, []),
        (square, ["dot_general", "transpose", "gather", "scan", "conv_general_dilated"]),
    ],
)
def test_a_model_runs_and_what_a_kind_cannot_do_is_reported(make, uses):
    tree, x = params(make), jnp.asarray(np.random.default_rng(1).integers(-4, 5, (3, 8)), jnp.float32)
    result = jax.jit(jc.execute(model))(tree, x)
    np.testing.assert_allclose(result, model(jc.materialize(tree), x), rtol=1e-5)
    assert [fallback.primitive for fallback in fallbacks(model, tree, x)] == uses


@pytest.mark.parametrize("make", [steps, square])
def test_a_sharded_leaf_computes_the_same(make):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    leaf, x = make(8, 8), jnp.ones((3, 8))
    shardings = component_shardings(leaf, NamedSharding(mesh, PartitionSpec("data", "model")))
    spec = PartitionSpec() if make is square else PartitionSpec("data", "model")
    assert jax.tree.leaves(shardings)[0].spec == spec
    run = jax.jit(jc.execute(lambda leaf, x: x @ leaf))
    np.testing.assert_array_equal(run(jax.device_put(leaf, shardings), x), run(leaf, x))


@pytest.mark.parametrize("storage", ["orbax", "entropy"])
def test_saved_and_restored(tmp_path, storage):
    tree = {
        **params(steps),
        "square": square(3, 2),
        "halves": StepsArray(counts=counts(4), dtype=jnp.dtype("bfloat16")),
    }
    jc.checkpoint.save(tmp_path / "c", tree, storage=storage)
    restored, _ = jc.checkpoint.restore(tmp_path / "c")
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    for new, old in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(new, old)


def test_exported_functions_take_it():
    run = jax.jit(jc.execute(lambda leaf, x: x @ leaf))
    leaf, x = steps(8, 4), jnp.ones((3, 8))
    exported = jax.export.deserialize(jax.export.export(run)(leaf, x).serialize())
    np.testing.assert_array_equal(exported.call(leaf, x), run(leaf, x))


def test_described_measured_and_validated():
    assert jc.report.describe_leaf(steps(4, 2)) == "steps of 0.25"
    assert jc.report.describe_leaf(square(4, 2)) == "SquareArray"
    (size,) = jc.report.size_report({"w": steps(4, 2)}).leaves
    assert (size.kind, size.stored_bytes, size.weights) == ("steps of 0.25", 8, 8)
    assert (square(4, 2).nbytes, square(4, 2).ndim, square(4, 2).size) == (32, 2, 8)
    for good in (steps(4, 2), square(4, 2)):
        validate_array(good)
    with pytest.raises(ValueError, match="at most 7 steps"):
        validate_array(StepsArray(counts=counts(3) + 8))


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="of the name 'SquareArray'"):
        array_kind()(type("SquareArray", (), {}))


def test_every_kind_of_the_library_has_a_maker():
    """`kinds.KINDS` is the table that tests of running, sharding, saving and validating go through."""
    layout = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
    leaves = [make(jax.random.normal(jax.random.key(0), (16, 8)), layout) for make in kinds.KINDS.values()]
    # The inputs of `InputQuantizedArray` are not those of its plain weight: see test_quantized_inputs.py.
    made = {type(part) for leaf in leaves for part in kinds.parts_within(leaf)} | {InputQuantizedArray}
    assert made == {kind.cls for kind in KINDS.values() if kind.cls.__module__.startswith("jaxcompress.")}
