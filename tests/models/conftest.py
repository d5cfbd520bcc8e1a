"""What the tests of models share: the golden model, a small uneven one, and how to copy files to damage them."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxcompress._src.models.bert.parameters import parameter_shapes
from jaxcompress.models import BertConfig, make_module

collect_ignore = ["golden"]  # its scripts run beside other versions of transformers
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden_dir():
    return GOLDEN / "tiny_bert"


@pytest.fixture(scope="session")
def golden():
    with np.load(GOLDEN / "tiny_bert.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def inputs(golden):
    return {name.removeprefix("input/"): array for name, array in golden.items() if name.startswith("input/")}


@pytest.fixture(scope="session")
def variant_golden():
    """Of a variant of BERT: its directory, and the inputs and outputs of the classes of Flax and of PyTorch."""

    @functools.cache
    def read(model_type):
        directory, arrays = GOLDEN / f"tiny_{model_type}", []
        for framework in ("flax", "torch"):
            with np.load(directory / f"{framework}.npz") as stored:
                arrays.append(dict(stored))
        return directory, *arrays

    return read


@pytest.fixture
def model_dir(golden_dir, tmp_path):
    """A copy of the golden directory, to be damaged."""
    return Path(shutil.copytree(golden_dir, tmp_path / "model"))


@pytest.fixture
def edit_config(model_dir):
    """Changes settings of the copy's `config.json`; `None` removes one."""

    def edit(**changes):
        path = model_dir / "config.json"
        settings = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))

    return edit


@pytest.fixture
def edit_weights(model_dir):
    """Replaces the copy's tensors by what a function makes of them."""
    from safetensors.numpy import load_file, save_file

    def edit(change):
        path = model_dir / "model.safetensors"
        tensors = load_file(path)
        save_file({name: np.ascontiguousarray(array) for name, array in change(tensors).items()}, path)

    return edit


@pytest.fixture
def uneven_config():
    """Layers of all kinds: whole, few heads, no heads, no FFN; the inner width is never the hidden size."""
    return BertConfig(
        vocab_size=30,
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=(4, 1, 0, 2),
        intermediate_size=(40, 8, 16, 0),
        head_size=8,
        max_position_embeddings=16,
    )


@pytest.fixture
def draw_params():
    """Random params of a config, from NumPy."""

    def draw(config, *, dtype=np.float32, seed=0):
        rng = np.random.default_rng(seed)
        leaves = {
            path: jnp.asarray((path.endswith("/scale") + 0.25 * rng.standard_normal(shape)).astype(dtype))
            for path, shape in parameter_shapes(config).items()
        }
        return unflatten_dict(leaves, sep="/")

    return draw


@pytest.fixture
def assert_same_params():
    """Same paths, dtypes and bits."""

    def check(found, expected):
        found, expected = flatten_dict(found, sep="/"), flatten_dict(expected, sep="/")
        assert found.keys() == expected.keys()
        for path, leaf in expected.items():
            assert found[path].dtype == leaf.dtype, path
            np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(leaf), err_msg=path)

    return check


@functools.cache
def _compiled(config, dtype, options):
    module = make_module(config, dtype=dtype)

    def apply(params, key, *args):
        rngs = None if key is None else {"dropout": key}
        return module.apply({"params": params}, *args, rngs=rngs, **dict(options))

    return jax.jit(apply)


@pytest.fixture
def run():
    """Applies the module of a config, compiled, because op by op takes longer. `dropout` is a key."""

    def apply(config, params, *args, dtype=jnp.float32, dropout=None, **options):
        return _compiled(config, dtype, tuple(options.items()))(params, dropout, *args)

    return apply
