"""Checkpoints that earlier versions wrote."""

from pathlib import Path

import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress._src.arrays.validate import validate_array

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
