"""What the tests of exports share."""

import pytest
from export_models import quantized_model
from flax.traverse_util import flatten_dict


@pytest.fixture
def model():
    return quantized_model


@pytest.fixture
def flat():
    return lambda params: flatten_dict(params, sep="/")
