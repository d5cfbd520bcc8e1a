"""`QuantSpec` says what is wrong, by argument and value."""

import pytest

from jaxcompress.quantization import QuantSpec


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 0}, r"`bits` must be .* got 0"),
        ({"bits": 9}, r"`bits` must be .* got 9"),
        ({"bits": 4, "group_size": 0}, r"`group_size` must be .* got 0"),
        ({"bits": 4, "group_size": 8, "per_tensor": True}, "group_size=8"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        QuantSpec(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 4.0}, r"bits.* 4\.0"),
        ({"bits": 4, "group_size": 2.5}, r"group_size.* 2\.5"),
        ({"bits": 4, "scale_dtype": "float16"}, "scale_dtype.* 'float16'"),
        ({"bits": 4, "convention": "wide"}, "convention.* 'wide'"),
    ],
)
def test_wrong_types_are_named(settings, message):
    # Under the import hook of the tests, the annotations speak before the checks do.
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}"):
        QuantSpec(**settings)


@pytest.mark.parametrize("bits", range(1, 9))
def test_code_ranges(bits):
    half = 2 ** (bits - 1)
    if bits > 1:
        assert QuantSpec(bits=bits, convention="narrow").code_range == (1 - half, half - 1)
        assert QuantSpec(bits=bits).code_range == (1 - half if bits == 8 else -half, half - 1)
        assert QuantSpec(bits=bits, convention="full").code_range == (-half, half - 1)
    assert QuantSpec(bits=bits, symmetric=False).code_range == (0, 2 * half - 1)
    assert QuantSpec(bits=bits).signed == (bits > 1)


def test_specs_are_values():
    assert QuantSpec(bits=4) == QuantSpec(bits=4)
    assert len({QuantSpec(bits=4), QuantSpec(bits=4), QuantSpec(bits=5)}) == 2
