"""Every coder gives back what it took, near the entropy; damaged bytes are an error or other codes, never a crash."""

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress._src.coding.adaptive import encode_adaptive
from jaxcompress._src.coding.arithmetic import BitDecoder, BitEncoder, squash, stretch
from jaxcompress._src.coding.codes import Coder, decode_codes, encode_codes
from jaxcompress._src.coding.rans import quantized_frequencies

WRITTEN = [coder for coder in Coder if coder is not Coder.GAPS]
SHAPES = [(0,), (0, 5), (1,), (3,), (7, 5), (1, 300), (40, 50), (5, 3, 2, 7), (2, 4100)]


def codes(shape, bits, zeros, seed=0):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < zeros, 0, rng.binomial(2**bits - 1, 0.4, shape)).astype(np.uint8)


def entropy_bytes(x):
    shares = np.bincount(x.ravel()) / x.size
    shares = shares[shares > 0]
    return -(shares * np.log2(shares)).sum() * x.size / 8


@pytest.mark.parametrize("coder", [None, *WRITTEN])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_round_trip(coder, bits):
    for shape in SHAPES:
        for zeros in (0.0, 0.9, 1.0):
            x = codes(shape, bits, zeros)
            found = decode_codes(encode_codes(x, bits=bits, coder=coder), shape, bits=bits)
            assert found.dtype == np.uint8
            np.testing.assert_array_equal(found, x)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 15), max_size=60), st.sampled_from(WRITTEN))
def test_round_trip_of_anything(values, coder):
    x = np.array(values, np.uint8)
    np.testing.assert_array_equal(decode_codes(encode_codes(x, bits=4, coder=coder), x.shape, bits=4), x)


def test_sizes_are_those_of_the_entropy():
    dense = codes((300, 200), 4, 0.3)
    assert len(encode_codes(dense, bits=4, coder=Coder.RANS)) < 1.005 * entropy_bytes(dense) + 20
    sparse = codes((300, 200), 3, 0.97)
    assert len(encode_codes(sparse, bits=3, coder=Coder.RANS)) < 1.01 * entropy_bytes(sparse) + 20


def test_nonzeros_are_found_in_rows_and_columns():
    """Nonzeros in some rows and columns only: far below the entropy of codes that are taken one by one."""
    rng = np.random.default_rng(0)
    share = np.outer(rng.choice([0.0, 0.4], 120, p=[0.6, 0.4]), rng.choice([0.02, 0.5], 90))
    x = ((rng.random((120, 90)) < share) * rng.integers(1, 4, (120, 90))).astype(np.uint8)
    assert len(encode_codes(x, bits=2, coder=Coder.ADAPTIVE)) < 0.9 * entropy_bytes(x)
    # The classes of rows and columns take bytes: they pay where there are many codes of each.
    large = np.tile(x, (8, 8))
    assert len(encode_codes(large, bits=2, coder=Coder.DENSITIES)) < 0.9 * entropy_bytes(large)
    assert len(encode_codes(x, bits=2)) <= len(encode_codes(x, bits=2, coder=Coder.ADAPTIVE))
    assert len(encode_adaptive(np.zeros((200, 300), int), 4)) < 60


def test_bytes_are_the_same_on_every_platform():
    """A format cannot change: files would no longer be read."""
    x = codes((23, 31), 3, 0.8, seed=7)
    found = {coder.name: encode_codes(x, bits=3, coder=coder) for coder in WRITTEN}
    assert {name: (len(data), zlib.crc32(data)) for name, data in found.items()} == FORMAT


FORMAT = {
    "PLAIN": (269, 4204654755),
    "RANS": (121, 3288017934),
    "ADAPTIVE": (113, 2903349412),
    "DENSITIES": (188, 3637567548),
}


@pytest.mark.parametrize("coder", WRITTEN)
def test_damage_never_crashes(coder):
    x = codes((30, 40), 3, 0.8)
    data = encode_codes(x, bits=3, coder=coder)
    rng = np.random.default_rng(0)
    noticed = 0
    for trial in range(60):
        broken = bytearray(data)
        if trial % 3 == 0:
            broken = broken[: rng.integers(0, len(data))]
        elif trial % 3 == 1:
            broken += bytes([1 + int(rng.integers(255))])
        else:
            broken[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        try:
            found = decode_codes(bytes(broken), x.shape, bits=3)
            assert found.shape == x.shape
        except ValueError:
            noticed += 1
    assert noticed >= 15


def test_bad_arguments():
    with pytest.raises(ValueError, match="`bits` must be in"):
        encode_codes(np.zeros(3, np.uint8), bits=9)
    with pytest.raises(ValueError, match="Codes of 2 bits are from 0 to 3, got 1 to 4"):
        encode_codes(np.array([1, 4]), bits=2)
    with pytest.raises(ValueError, match="`coder` must be one of PLAIN, RANS, ADAPTIVE, DENSITIES, got GAPS"):
        encode_codes(np.zeros(3, np.uint8), coder=Coder.GAPS)
    for data in (b"", b"\x63", b"\x03"):
        with pytest.raises(ValueError, match="is unknown"):
            decode_codes(data, (3,))


def test_frequencies_keep_every_symbol_and_sum_up():
    rng = np.random.default_rng(0)
    counts = np.stack([rng.integers(0, 3, 256), np.r_[10**9, np.ones(255, int)], np.r_[np.zeros(255, int), 7]])
    found = quantized_frequencies(counts.astype(np.int64))
    assert (found.sum(1) == 1 << 14).all()
    np.testing.assert_array_equal(found > 0, counts > 0)


def test_the_arithmetic_coder_at_the_edges():
    rng = np.random.default_rng(0)
    probabilities = rng.choice([1, 4, 300, 1 << 15, (1 << 16) - 1], 3000).tolist()
    bits = [int(rng.random() < p / 65536) for p in probabilities]
    encoder = BitEncoder()
    for p, bit in zip(probabilities, bits, strict=True):
        encoder.code(p, bit)
    data = encoder.done()
    ideal = -sum(np.log2(p / 65536 if bit else 1 - p / 65536) for p, bit in zip(probabilities, bits, strict=True)) / 8
    assert len(data) <= ideal * 1.01 + 4
    decoder = BitDecoder(data)
    assert [decoder.code(p) for p in probabilities] == bits
    decoder.check_done()


def test_stretch_and_squash():
    p = np.array([4, 50, 700, 4095, 4096, 32768, 60000, 65000])
    logit = np.log((p + 0.5) / (65536 - p - 0.5)) * 256
    # Above 4095 sixteen probabilities share an entry.
    np.testing.assert_allclose([stretch(int(x)) for x in p], logit, atol=8)
    assert [squash(x) for x in (-9999, 0, 9999)] == [4, 32768, 65532]
    assert squash(256) == pytest.approx(65536 / (1 + np.exp(-1)), abs=1)
