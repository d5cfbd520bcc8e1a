"""What is saved comes back: classes, static fields, shapes, dtypes, bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from jaxcompress._src.arrays.protocol import KINDS
from jaxcompress._src.checkpoint.manifest_json import STORED_DTYPES
from jaxcompress.checkpoint import restore, save
from jaxcompress.tree import partition_trainable

BASE = np.arange(24).reshape(4, 6)


@pytest.mark.parametrize("dtype", sorted(STORED_DTYPES))
def test_every_dtype_keeps_its_bits_in_numpy(tmp_path, assert_same, dtype):
    array = (BASE % 2 if dtype == "bool" else BASE % 3).astype(jnp.dtype(dtype))
    save(tmp_path / "c", {"a": array, "zero_dim": array[1, 1], "scalar array": np.array(array[1, 1])})
    found, _ = restore(tmp_path / "c")
    assert_same(found, {"a": array, "zero_dim": array[1, 1], "scalar array": np.array(array[1, 1])})


def test_jax_dtypes_special_values_and_scalars(tmp_path, assert_same):
    specials = np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 1e-45, 3.4e38], np.float32)
    dtypes = ("bool", "int8", "uint8", "int32", "uint32", "float16", "bfloat16", "float32", "complex64")
    params = {dtype: jnp.asarray(BASE % 2, dtype) for dtype in dtypes}
    params |= {"specials": jnp.asarray(specials), "half": jnp.asarray(specials, jnp.bfloat16), "scalar": jnp.int8(3)}
    save(tmp_path / "c", params)
    assert_same(restore(tmp_path / "c")[0], params)


def test_memory_and_byte_order_do_not_matter(tmp_path):
    arrays = [BASE.T, BASE[::2, ::-3], np.asfortranarray(BASE), np.broadcast_to(BASE[0], (3, 6)), BASE.astype(">i4")]
    memmap = np.memmap(tmp_path / "m", np.float32, "w+", shape=(2, 3))
    memmap[:] = 7
    save(tmp_path / "c", [*arrays, memmap])
    found, _ = restore(tmp_path / "c")
    for new, old in zip(found, [*arrays, memmap], strict=True):
        np.testing.assert_array_equal(new, old)
        assert new.dtype == old.dtype.newbyteorder("=")


def test_compressed_leaves(tmp_path, assert_same, compressed):
    save(tmp_path / "c", compressed)
    found, _ = restore(tmp_path / "c")
    assert_same(found, compressed)
    assert [type(leaf) for leaf in found.values()] == [type(leaf) for leaf in compressed.values()]


def test_every_kind_of_the_library_is_saved(compressed):
    """Of a new kind, add a leaf to `conftest.py`."""
    kinds = {kind.cls for kind in KINDS.values() if kind.cls.__module__.startswith("jaxcompress.")}
    assert kinds == {type(part) for leaf in compressed.values() for part in (leaf, *vars(leaf).values())} & kinds


def test_arrays_without_elements(tmp_path, assert_same, compressed):
    empty = jax.tree.map(lambda part: part[:0], compressed["stacked"])
    params = {"jax": jnp.zeros((0, 3), jnp.bfloat16), "numpy": np.zeros((2, 0), np.float64), "compressed": empty}
    save(tmp_path / "c", params)
    assert_same(restore(tmp_path / "c")[0], params)
    save(tmp_path / "with others", {"a": params, "b": jnp.ones(2)})
    assert_same(restore(tmp_path / "with others")[0], {"a": params, "b": jnp.ones(2)})


@pytest.mark.parametrize("tree", [{}, [], (), None, {"a": {}, "b": [(), None]}, 3, jnp.arange(3)])
def test_trees_without_arrays_and_bare_leaves(tmp_path, assert_same, tree):
    save(tmp_path / "c", tree)
    found, _ = restore(tmp_path / "c")
    assert type(found) is type(tree)
    assert_same(found, tree)


def test_python_numbers(tmp_path):
    numbers = [True, False, 0, -(2**70), 0.1, float("inf"), float("-inf"), 5e-324, -0.0, 1 + 2j, float("nan")]
    save(tmp_path / "c", numbers)
    found, _ = restore(tmp_path / "c")
    assert [(type(new), repr(new)) for new in found] == [(type(old), repr(old)) for old in numbers]


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_typed_keys(tmp_path, assert_same, impl):
    key = jax.random.key(7, impl=impl)
    params = {"one": key, "many": jax.random.split(key, (2, 3)), "none": jax.random.split(key, 2)[:0]}
    save(tmp_path / "c", params)
    found, _ = restore(tmp_path / "c")
    assert_same(found, params)
    assert bool((jax.random.bits(found["one"], (4,)) == jax.random.bits(key, (4,))).all())


def test_partial_compressed_leaves_as_optimizers_hold_them(tmp_path, assert_same, compressed):
    trainable, rest = partition_trainable({"a": compressed["int4 groups"], "b": compressed["int8 bit mask"]})
    save(tmp_path / "c", {"mu": trainable, "rest": rest})
    assert_same(restore(tmp_path / "c")[0], {"mu": trainable, "rest": rest})


def test_64_bit_jax_arrays_need_64_bits_on_restore(tmp_path):
    with jax.enable_x64(True):
        wide = jnp.asarray(np.array([0.1, 2.0]))
        assert wide.dtype == jnp.float64
        save(tmp_path / "c", {"layer": {"wide": wide}})
        assert restore(tmp_path / "c")[0]["layer"]["wide"].dtype == jnp.float64
    with pytest.raises(ValueError, match=r"leaf 'layer/wide' is float64.*float32.*jax_enable_x64"):
        restore(tmp_path / "c")


def test_saving_again_what_was_restored_changes_nothing(tmp_path, compressed):
    save(tmp_path / "first", {"a": compressed, "b": jax.random.key(0)}, config={"n": 1}, metadata={"m": [1, None]})
    params, info = restore(tmp_path / "first")
    save(tmp_path / "second", params, config=info.config, metadata=info.metadata)
    first, second = [(tmp_path / name / "manifest.json").read_text() for name in ("first", "second")]
    assert first[: first.index('"files"')] == second[: second.index('"files"')]


_LEAVES = (
    st.floats(allow_nan=False)
    | st.just(float("nan"))  # of Python numbers, the bits behind a NaN are not kept
    | st.integers()
    | st.booleans()
    | st_numpy.arrays(
        st.sampled_from([np.float32, np.int8, np.bool_, np.float64]), st_numpy.array_shapes(min_dims=0, min_side=0)
    )
)


def _containers(children):
    # JAX sorts the keys of a dict, so those of one dict are all text or all numbers.
    same_kind = st.dictionaries(st.text(max_size=4), children, max_size=3) | st.dictionaries(
        st.integers(-5, 5), children, max_size=3
    )
    return same_kind | st.lists(children, max_size=3) | st.lists(children, max_size=3).map(tuple) | st.none()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=st.recursive(_LEAVES, _containers, max_leaves=6))
def test_any_tree_of_plain_containers(tmp_path, assert_same, tree):
    save(tmp_path / "c", tree, overwrite=(tmp_path / "c").exists())
    found, _ = restore(tmp_path / "c")
    assert_same(found, tree)
