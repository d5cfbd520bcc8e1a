"""A number format takes one object: it is rounded to, stored, learned and written as those of the library are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_formats import NO_ZERO, TABLE, THIRDS, TOYS, rounded_by_hand

import jaxcompress as jc
from jaxcompress._src.arrays.validate import validate_array
from jaxcompress._src.quantization.formats.number_format import NumberFormat
from jaxcompress._src.quantization.formats.tables import Table
from jaxcompress._src.quantization.spec import FORMATS
from jaxcompress._src.recipe.options import options_of
from jaxcompress.calibration import input_statistics
from jaxcompress.checkpoint import restore, save
from jaxcompress.quantization import QuantSpec, fake_quantize, gptq, lsq, quantize, quantize_inputs

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
PARAMS = {"k": jnp.asarray(RNG.normal(size=(16, 6)), jnp.float32)}
X = RNG.normal(size=(80, 16)) @ (RNG.normal(size=(16, 16)) / 4 + 0.4)
with_toys = pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)


def _apply(params, x):
    return x @ params["k"]


def _assert_same(stored, back):
    assert jax.tree.structure(back) == jax.tree.structure(stored)
    for x, y in zip(jax.tree.leaves(stored), jax.tree.leaves(back), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@with_toys
def test_weights_are_the_nearest_ones(toy):
    small, info = quantize(PARAMS, QuantSpec(format=toy))
    validate_array(small["k"])
    np.testing.assert_allclose(small["k"].materialize(), rounded_by_hand(PARAMS["k"], toy), rtol=1e-6)
    assert small["k"].bits == {"toy": 3, "toy without zero": 2, "thirds": 3}[toy.name]
    assert info["k"].bits_per_weight == small["k"].bits + 2
    np.testing.assert_array_equal(fake_quantize(PARAMS, QuantSpec(format=toy))["k"], small["k"].materialize())


def test_a_tuple_of_values_is_a_table():
    wanted = quantize(PARAMS, QuantSpec(format=TABLE))[0]["k"]
    _assert_same(quantize(PARAMS, QuantSpec(format=TABLE.levels))[0]["k"], wanted)
    assert QuantSpec(format=TABLE.levels) == QuantSpec(format=TABLE.levels) != QuantSpec(format=NO_ZERO.levels)
    for levels, message in (((1.0, 0.0), "ascend"), ((1.0,), "2 to 256 levels")):
        with pytest.raises(ValueError, match=message):
            QuantSpec(format=levels)


@with_toys
@pytest.mark.parametrize("settings", [{"group_size": 8, "scale_dtype": "e8m0"}, {"range_rule": "mse"}])
def test_stored_equals_fake(toy, settings):
    """With zeros, which stay, and under every kind of scale."""
    spec = QuantSpec(format=toy, **settings)
    params = {"k": PARAMS["k"].at[3, 2].set(0.0).at[:, 5].set(0.0)}
    stored = quantize(params, spec)[0]["k"]
    validate_array(stored)
    np.testing.assert_array_equal(stored.materialize(), fake_quantize(params, spec)["k"])
    assert (stored.materialize()[params["k"] == 0] == 0).all()


@with_toys
def test_gptq_rounds_to_it(toy):
    statistics = input_statistics(_apply, PARAMS, [(jnp.asarray(X, jnp.float32),)])
    small, info = gptq(PARAMS, statistics, QuantSpec(format=toy))
    values = np.asarray(small["k"].materialize(), np.float64) / np.asarray(small["k"].scale, np.float64)
    levels = np.arange(-3.0, 4.0) if toy.levels is None else np.asarray(toy.levels)
    assert np.abs(values[..., None] - levels).min(-1).max() < 1e-6
    error = np.linalg.norm(X @ (np.asarray(small["k"].materialize()) - PARAMS["k"])) / np.linalg.norm(X @ PARAMS["k"])
    np.testing.assert_allclose(info["k"].error, error, rtol=1e-3)
    assert info["k"].error < 0.8 * info["k"].error_before


@with_toys
def test_steps_are_learned(toy):
    transform, optimizer = lsq(QuantSpec(format=toy)), optax.adam(1e-2)
    state = transform.init(PARAMS, key=KEY)
    inner = optimizer.init(state.trainable)

    def loss(trainable):
        return jnp.square(transform.apply(PARAMS, state._replace(trainable=trainable))["k"] - PARAMS["k"]).sum()

    first = loss(state.trainable)
    for _ in range(20):
        updates, inner = optimizer.update(jax.grad(loss)(state.trainable), inner)
        state = state._replace(trainable=optax.apply_updates(state.trainable, updates))
    assert loss(state.trainable) < first
    stored = transform.finalize(PARAMS, state)["k"]
    np.testing.assert_array_equal(stored.materialize(), jax.jit(transform.apply)(PARAMS, state)["k"])


@with_toys
def test_it_survives_a_checkpoint(toy, tmp_path, monkeypatch):
    """Weights bring their levels along; for inputs the file holds the name of the format."""
    monkeypatch.setitem(FORMATS, toy.name, toy)
    small, _ = quantize(PARAMS, QuantSpec(format=toy.name))
    assert small["k"].levels == QuantSpec(format=toy).levels
    marked, _ = quantize_inputs(small, QuantSpec(format=toy.name))
    save(tmp_path / "c", marked)
    back, _ = restore(tmp_path / "c")
    _assert_same(marked, back)
    x = jnp.asarray(X[:4], jnp.float32)
    wanted = rounded_by_hand(x.T, toy).T @ np.asarray(small["k"].materialize())
    np.testing.assert_allclose(jc.execute(_apply)(back, x), wanted, rtol=1e-4, atol=1e-4)


def test_files_name_the_formats_of_inputs(tmp_path):
    marked, _ = quantize_inputs(PARAMS, QuantSpec(format=TABLE))
    with pytest.raises(TypeError, match="hold number formats by names"):
        save(tmp_path / "c", marked)
    save(tmp_path / "d", quantize(PARAMS, QuantSpec(format=TABLE))[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": TABLE, "bits": 4}, "Codes of format 'toy' have 3 bits, got `bits` 4"),
        ({"format": THIRDS, "symmetric": False}, "are choices of integers; format 'thirds' has none"),
        (
            {"format": "thirds"},
            r"must be one of \('int', 'ternary', .*'mxfp8_e5m2'\), a tuple, or a `NumberFormat`, got 'thirds'",
        ),
    ],
)
def test_what_it_does_not_have_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        QuantSpec(**settings)


def test_zeros_that_it_does_not_have_are_named():
    params = {"k": PARAMS["k"].at[0, 0].set(0)}
    statistics = input_statistics(_apply, params, [(jnp.asarray(X, jnp.float32),)])
    with pytest.raises(ValueError, match="holds zeros, which format 'toy without zero' does not have"):
        gptq(params, statistics, QuantSpec(format=NO_ZERO))


@pytest.mark.parametrize("levels", [(1.0,), (0.0, 0.0, 1.0), tuple(map(float, range(300)))])
def test_bad_tables_are_named(levels):
    with pytest.raises(ValueError, match=r"(?i)a table"):
        Table(name="bad", levels=levels)


def test_a_zero_point_that_nothing_would_read_is_refused():
    with pytest.raises(TypeError, match=r"Halves has a `fixed_zero_point`, which is for formats with `uses_range"):
        type("Halves", (NumberFormat,), {"fixed_zero_point": -0.5})


def test_every_format_is_in_the_docs_and_in_recipes():
    undocumented = [name for name in FORMATS if f'"{name}"' not in QuantSpec.__doc__]
    assert undocumented == [], f"{undocumented} need rows in the table of formats, in the docstring of `QuantSpec`."
    assert set(options_of(quantize)["format"].kind.__args__) == set(FORMATS)
