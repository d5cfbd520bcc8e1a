"""Checkpoints that earlier versions wrote."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress._src.arrays.validate import validate_array
from jaxcompress._src.coding.codes import decode_codes
from jaxcompress._src.tree.unselected import is_unselected
from jaxcompress._src.types import TransformState

GOLDEN = Path(__file__).parent / "golden"


def test_zero_points_of_a_byte_each(tmp_path):
    with pytest.warns(UserWarning, match="without a checksum"):
        found, _ = jc.checkpoint.restore(GOLDEN / "plain_zero_points")
    with np.load(GOLDEN / "plain_zero_points.npz") as dense:
        for name, leaf in found.items():
            validate_array(leaf)
            assert leaf.zero_point.dtype == np.uint8
            np.testing.assert_array_equal(leaf.materialize(), dense[name])
    jc.checkpoint.save(tmp_path / "again", found)
    again, _ = jc.checkpoint.restore(tmp_path / "again")
    np.testing.assert_array_equal(again["a"].materialize(), found["a"].materialize())


@pytest.fixture(params=["orbax", "entropy"])
def every_kind(request, tmp_path):
    """What commit 51c5f7b (version 0.1.0) wrote: the restored tree, its info, and what its leaves were."""
    shutil.unpack_archive(GOLDEN / "every_kind.zip", tmp_path)
    tree, info = jc.checkpoint.restore(tmp_path / request.param)
    assert (info.metadata["commit"], info.versions["jaxcompress"], info.format_version) == ("51c5f7b", "0.1.0", 3)
    with np.load(GOLDEN / "every_kind.npz") as values:
        return tree, info, dict(values)


def test_every_kind_comes_back(every_kind):
    tree, info, values = every_kind
    leaves = tree["leaves"]
    assert set(leaves) == set(info.metadata["kinds"])
    assert {type(part).__name__ for leaf in leaves.values() for part in kinds.parts_within(leaf)} == {
        *("PackedArray", "QuantizedArray", "NMSparseArray", "BitmaskSparseArray"),
        *("CodebookArray", "AdditiveCodebookArray", "LowRankArray", "InputQuantizedArray"),
    }
    for name, leaf in leaves.items():
        validate_array(leaf)
        dense = leaf.materialize()
        assert dense.shape == leaf.shape
        np.testing.assert_array_equal(np.asarray(dense, np.float32), values[name], err_msg=name)


def test_every_kind_is_described_and_multiplied_as_before(every_kind):
    tree, info, values = every_kind
    run = jc.execute(lambda weight, x: x @ weight)
    # Of partial groups, that version named the mean size.
    info.metadata["kinds"].update({"partial": "int4 g6", "partial zero points": "uint8 g5"})
    for name, leaf in tree["leaves"].items():
        assert jc.report.describe_leaf(leaf) == info.metadata["kinds"][name]
        if f"{name} @" in values:
            np.testing.assert_allclose(
                run(leaf, jnp.asarray(values["inputs"])), values[f"{name} @"], rtol=1e-6, atol=1e-6
            )
    assert tree["leaves"]["static inputs"].inputs.gradient == "pact"


def test_the_state_of_a_transform_comes_back(every_kind):
    tree, _, values = every_kind
    state = tree["state"]
    assert isinstance(state, TransformState)
    np.testing.assert_array_equal(state.trainable["a"], np.linspace(-1, 1, 5, dtype=np.float32))
    assert is_unselected(state.trainable["b"])
    np.testing.assert_array_equal(state.fixed["mask"], tree["leaves"]["bit mask"].mask())
    assert (state.fixed["step"].dtype, int(state.fixed["step"])) == (np.int32, 7)
    np.testing.assert_array_equal(jax.random.key_data(state.fixed["key"]), [0, 3])
    np.testing.assert_array_equal(state.fixed["leaf"].materialize(), values["int4 groups"])


@pytest.mark.parametrize("coder", ["PLAIN", "RANS", "GAPS", "ADAPTIVE"])
def test_bytes_of_every_coder_are_read(coder):
    with np.load(GOLDEN / "every_kind.npz") as values:
        data, codes = values[f"coder {coder}"].tobytes(), values["codes"]
    np.testing.assert_array_equal(decode_codes(data, codes.shape, bits=2), codes)
