"""Counts of weights and bytes, against plain arithmetic."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcompress._src.arrays.packed import pack
from jaxcompress._src.report.disk import disk_bytes
from jaxcompress._src.report.table import format_table, leaf_table, total_table
from jaxcompress.arrays import CodebookArray, QuantizedArray, sparsify
from jaxcompress.report import describe_leaf, size_report
from jaxcompress.tree import by_path, exclude, partition_trainable

CODES = jnp.asarray(np.arange(64 * 8).reshape(64, 8) % 7 - 3, jnp.int8)
HALF = jnp.arange(64)[:, None] % 4 < jnp.full((1, 8), 2)


def _quantized(data, scale_shape, dtype="float32", **fields):
    return QuantizedArray(data=data, scale=jnp.ones(scale_shape, dtype), dtype=jnp.dtype("float32"), **fields)


def _nested():
    sparse = sparsify(CODES, HALF, pattern=(2, 4), axis=0)
    return _quantized(dataclasses.replace(sparse, values=pack(sparse.values, bits=4, axis=0)), (2, 8), "bfloat16")


# Leaf, kind in words, bits that are stored.
LEAVES = {
    "dense": (jnp.ones((64, 8)), "float32", 32 * 512),
    "half": (jnp.ones((64, 8), jnp.bfloat16), "bfloat16", 16 * 512),
    "numpy": (np.ones((64, 8)), "float64", 64 * 512),
    "mask": (jnp.ones((64, 8), bool), "bool", 8 * 512),
    "packed": (pack(CODES, bits=3, axis=0), "int3", 3 * 512),
    "per tensor": (_quantized(CODES, (1, 1)), "int8 per-tensor", 8 * 512 + 32),
    "per channel": (_quantized(CODES, (1, 8)), "int8 per-channel", 8 * 512 + 8 * 32),
    "groups": (_quantized(pack(CODES, bits=4, axis=0), (2, 8), "bfloat16"), "int4 g32", 4 * 512 + 16 * 16),
    "blocks": (_quantized(CODES, (4, 2)), "int8 b16x4", 8 * 512 + 8 * 32),
    "per weight": (_quantized(CODES, (64, 8)), "int8 per-weight", 8 * 512 + 32 * 512),
    "zero point": (
        _quantized(
            pack((CODES + 3).astype(jnp.uint8), bits=4, axis=0), (1, 8), zero_point=jnp.full((1, 8), 3, jnp.uint8)
        ),
        "uint4 per-channel",
        4 * 512 + 8 * (32 + 8),
    ),
    "levels": (
        _quantized(pack((CODES + 3).astype(jnp.uint8), bits=4, axis=0), (4, 8), levels=tuple(map(float, range(-8, 8)))),
        "uint4 levels g16",
        4 * 512 + 32 * 32,
    ),
    "bit mask": (sparsify(CODES.astype(jnp.float32), HALF), "float32 bitmask", 32 * 256 + 512 + 64 * 32),
    "2:4": (sparsify(CODES.astype(jnp.bfloat16), HALF, pattern=(2, 4), axis=0), "bfloat16 2:4", (16 + 2) * 256),
    "int4 2:4": (_nested(), "int4 g32 2:4", (4 + 2) * 256 + 16 * 16),
}


@pytest.mark.parametrize("name", LEAVES)
def test_kind_bytes_and_nonzeros(name):
    leaf, kind, bits = LEAVES[name]
    report = size_report({"kernel": leaf})
    (found,) = report.leaves
    plain = np.asarray(leaf.materialize() if hasattr(leaf, "materialize") else leaf)
    assert (found.kind, found.shape, found.weights) == (kind, (64, 8), 512)
    assert found.nonzeros == np.count_nonzero(plain)
    assert found.stored_bytes == -(-bits // 8)
    assert found.bits_per_weight == 8 * found.stored_bytes / 512
    assert found.dense_bytes == 4 * 512
    assert report.total.sparsity == 1 - found.nonzeros / 512
    assert report.total.compression == 2048 / found.stored_bytes


@pytest.mark.parametrize("name", [name for name in LEAVES if name != "numpy"])
def test_abstract_leaves_have_every_number_but_nonzeros(name):
    leaf = LEAVES[name][0]
    concrete, abstract = size_report({"a": leaf}), size_report({"a": jax.eval_shape(lambda: leaf)})
    assert abstract.leaves[0] == dataclasses.replace(concrete.leaves[0], nonzeros=None)
    assert (abstract.total.nonzeros, abstract.total.sparsity) == (None, None)
    assert size_report({"a": leaf, "b": jax.ShapeDtypeStruct((1,), jnp.int8)}).total.nonzeros is None


@settings(max_examples=30, deadline=None)
@given(
    arrays=st.lists(
        st_numpy.arrays(np.int8, st_numpy.array_shapes(min_dims=0, min_side=0), elements=st.integers(0, 1)), max_size=5
    )
)
def test_totals_are_sums(arrays):
    report = size_report({"embedding": arrays[0], "rest": arrays[1:]} if arrays else {})
    assert report.total.weights == sum(array.size for array in arrays)
    assert report.total.nonzeros == sum(int(array.sum()) for array in arrays)
    assert report.total.stored_bytes * 4 == report.total.dense_bytes == 4 * report.total.weights
    for field in ("leaves", "weights", "nonzeros", "dense_bytes", "stored_bytes"):
        assert sum(getattr(group, field) for group in report.groups) == getattr(report.total, field)


def test_nan_is_not_zero_and_negative_zero_is():
    (leaf,) = size_report({"a": jnp.array([jnp.nan, -0.0, 0.0, jnp.inf])}).leaves
    assert leaf.nonzeros == 2


def test_counts_of_sharded_arrays():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    array = jax.device_put((jnp.arange(64.0) % 3).reshape(8, 8), NamedSharding(mesh, PartitionSpec("x")))
    assert size_report({"a": array}).total.nonzeros == np.count_nonzero(np.arange(64) % 3)


def test_tied_leaves_are_counted_once_and_say_so():
    table, leaf = jnp.ones((10, 4)), LEAVES["groups"][0]
    params = {"embed": {"embedding": table}, "head": {"kernel": table}, "x": leaf, "y": jax.tree.map(lambda x: x, leaf)}
    tables = by_path(".*/embedding")
    report = size_report(params | {"z": jnp.ones((10, 4))}, group_by={"rest": exclude(tables), "tables": tables})
    assert [item.tied_to for item in report.leaves] == [None, "embed/embedding", None, "x", None]
    assert report.total.weights == 40 + 512 + 40
    assert [(group.name, group.leaves, group.weights) for group in report.groups] == [
        ("rest", 2, 552),
        ("tables", 1, 40),
    ]
    assert "tied to embed/embedding" in format_table(leaf_table(report))


def test_one_abstract_leaf_that_stands_for_many_is_no_tie():
    abstract = jax.ShapeDtypeStruct((3,), jnp.float32)
    assert size_report([abstract, abstract]).total.weights == 6


def test_default_groups_are_the_first_keys():
    params = {"word": {"kernel": jnp.ones(1), "embedding": jnp.ones(2)}, "embedding": jnp.ones(4)}
    assert [(group.name, group.weights) for group in size_report(params).groups] == [("embedding", 4), ("word", 3)]


def test_groups_by_selectors_and_by_function():
    params = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "b": {"kernel": LEAVES["groups"][0]}}
    chosen = size_report(params, group_by={"second": by_path("b/.*"), "first": by_path("a/kernel")})
    assert [(group.name, group.weights) for group in chosen.groups] == [("second", 512), ("first", 6), ("other", 3)]
    by_name = size_report(params, group_by=lambda path, leaf: f"{len(leaf.shape)} axes")
    assert [(group.name, group.weights) for group in by_name.groups] == [("1 axes", 3), ("2 axes", 518)]
    with pytest.raises(ValueError, match=r"Leaf 'a/kernel' is in the groups 'x', 'y'; groups must not overlap"):
        size_report(params, group_by={"x": by_path(".*/kernel"), "y": by_path("a/.*")})
    with pytest.raises(ValueError, match="matches no leaf"):
        size_report(params, group_by={"x": by_path("nothing")})


def test_baseline_dtype_changes_the_dense_bytes_only():
    leaf = jnp.ones((4, 2))
    assert size_report(leaf, baseline=jnp.bfloat16).total.compression == 0.5
    assert size_report(leaf, baseline="bfloat16").baseline == "bfloat16"


def test_leaves_without_numbers_are_left_out():
    report = size_report({"key": jax.random.key(0), "step": 3, "none": None, "empty": jnp.zeros((0, 3))})
    assert [leaf.path for leaf in report.leaves] == ["empty"]
    assert report.total.weights == 0
    assert math.isnan(report.total.bits_per_weight)
    assert math.isnan(report.total.compression)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["total"]["compression"] is None
    assert size_report({}).groups == ()


def test_an_error_names_the_leaf():
    trainable, _ = partition_trainable({"layer": LEAVES["per channel"][0]})
    with pytest.raises(AttributeError) as caught:
        size_report(trainable)
    assert caught.value.__notes__ == ["at leaf 'layer'"]


def test_to_dict_is_json_with_every_field(tmp_path):
    (tmp_path / "model").write_bytes(b"12345")
    report = size_report({"a": LEAVES["int4 2:4"][0], "b": jnp.zeros(3)}, disk_path=tmp_path)
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["disk_bytes"] == 5
    assert found["total"]["weights"] == 515
    assert found["total"]["sparsity"] == report.total.sparsity
    assert [group["name"] for group in found["groups"]] == ["a", "b"]
    assert found["leaves"][0]["shape"] == [64, 8]
    assert set(found["leaves"][0]) == {field.name for field in dataclasses.fields(report.leaves[0])} | {
        "bits_per_weight"
    }


def test_tables_are_rectangular_and_show_what_is_unknown(tmp_path):
    (tmp_path / "model").write_bytes(bytes(1024))
    params = {"a": jax.ShapeDtypeStruct((64, 8), jnp.int8), "b": jnp.zeros(()), "embedding": jnp.zeros((0, 2))}
    report = size_report(params, disk_path=tmp_path)
    for table in (leaf_table(report), total_table(report)):
        assert {len(row) for row in table.rows} == {len(table.header)}
        lines = format_table(table).splitlines()
        assert len(lines) == len(table.rows) + 1
    assert leaf_table(report).rows[0] == ("a", "int8", "64x8", "512", "-", "512 B", "8.00")
    assert leaf_table(report).rows[1][2] == "scalar"
    assert [row[0] for row in total_table(report).rows] == ["a", "b", "embedding", "total", "on disk"]
    assert total_table(report).rows[-1] == ("on disk", "", "", "", "2.1 kB", "1.0 kB", "15.97", "2.00x")


def test_disk_bytes_sums_files_once(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "deep" / "er" / ".hidden").write_bytes(b"4567")
    assert disk_bytes(tmp_path) == 7
    assert disk_bytes(str(tmp_path / "a")) == 3
    (tmp_path / "same").hardlink_to(tmp_path / "a")
    assert disk_bytes(tmp_path) == 7
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "deep" / "linked").symlink_to(tmp_path / "a")
    assert disk_bytes(tmp_path) == 7
    assert disk_bytes(tmp_path / "deep") == 7
    assert disk_bytes(tmp_path / "deep" / "linked") == 3
    with pytest.raises(FileNotFoundError):
        disk_bytes(tmp_path / "nothing")


def test_codebooks_are_described():
    table = jnp.ones((1, 1, 15), jnp.float32)
    codes = pack(jnp.ones((8, 4), jnp.uint8), bits=4, axis=0)
    leaf = CodebookArray(data=codes, table=table, dtype=jnp.dtype("float32"), zero=True)
    assert describe_leaf(leaf) == "16 values uint4"
    assert describe_leaf(dataclasses.replace(leaf, zero=False, table=table[..., :9])) == "9 values uint4"
    sparse = dataclasses.replace(leaf, data=sparsify(jnp.eye(8, 4, dtype=jnp.uint8), jnp.eye(8, 4, dtype=bool)))
    assert describe_leaf(sparse) == "16 values uint8 bitmask"


def test_kinds_of_stacked_leaves_and_unknown_classes():
    stacked = jax.tree.map(lambda part: jnp.stack([part] * 3), LEAVES["groups"][0])
    assert describe_leaf(stacked) == "int4 g32"

    class Folded:
        shape, dtype, nbits = (2,), "float32", 3

        def materialize(self):
            raise NotImplementedError

    assert describe_leaf(Folded()) == "Folded"
