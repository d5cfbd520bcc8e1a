"""The file as such: names, errors, what is left behind where something fails, and constants of more than it holds."""

import functools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onnx_runs import assert_same, exported, run_session, session

import jaxcompress as jc
from jaxcompress._src.export.onnx import model_file
from jaxcompress.export import save_onnx

X = np.arange(6, dtype=np.float32).reshape(2, 3)
W = {"w": jnp.ones((3, 4))}


def multiplied(params, x):
    return x @ params["w"]


def test_names_of_arguments_and_trees(tmp_path):
    def apply(params, ids, rest, *more):
        return {"sum": ids + rest["a"][0], "pair": (rest["b"], more[0])}

    inputs = (X, {"a": [X], "b": X}, X)
    outputs, info = exported(tmp_path, apply, {}, *inputs)
    assert info.inputs == ("ids", "rest/a/0", "rest/b", "input_2")
    assert info.outputs == ("pair/0", "pair/1", "sum")
    assert_same(outputs, apply({}, *inputs))


def test_names_that_are_given(tmp_path):
    outputs, info = exported(tmp_path, multiplied, W, X, input_names=["image"], output_names=["logits"])
    assert (info.inputs, info.outputs) == (("image",), ("logits",))
    assert_same(outputs, multiplied(W, X))
    assert [value.name for value in session(tmp_path / "model.onnx").get_outputs()] == ["logits"]


def test_names_of_the_graph_are_no_names_of_inputs(tmp_path):
    """Values inside have names of their own."""
    outputs, _ = exported(tmp_path, lambda p, v1, v2: (v1 + v2) @ p["w"], W, X, X, output_names=["v3"])
    assert_same(outputs, 2 * X @ np.ones((3, 4), np.float32))


def test_an_output_with_the_name_of_an_input(tmp_path):
    outputs, info = exported(tmp_path, lambda p, x: {"x": x + 1}, {}, X)
    assert info.outputs == ("x_out",)
    assert_same(outputs, X + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_names": ["a", "b"]}, "`input_names` must be one for each of"),
        ({"output_names": []}, "`output_names` must be one for each of"),
        ({"input_names": ["y"], "output_names": ["y"]}, "`output_names` must be distinct"),
        ({"input_names": [""]}, "`input_names`"),
        ({"weight_bits": 6}, "`weight_bits` must be one of"),
        ({"input_ranges": "column"}, "`input_ranges` must be one of"),
        ({"accuracy_level": 5}, "`accuracy_level` must be one of"),
    ],
)
def test_options_that_do_not_fit(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_onnx(tmp_path / "m.onnx", multiplied, W, X, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("options", "operator"), [({"weight_bits": 7}, "Integer"), ({"accuracy_level": 4}, "NBits")])
def test_options_that_concern_no_leaf_are_said(options, operator, tmp_path):
    with pytest.warns(UserWarning, match=rf"Options without an effect .*{next(iter(options))}=.*`MatMul{operator}`"):
        save_onnx(tmp_path / "m.onnx", multiplied, W, X, **options)


def test_flags_are_static(tmp_path):
    def apply(params, x, double, nothing):
        assert nothing is None
        return x * 2 if double else x

    path = tmp_path / "m.onnx"
    info = save_onnx(path, apply, {}, X, True, None)
    assert info.inputs == ("x",)
    assert_same(run_session(session(path), info.inputs, X), 2 * X)


def test_an_input_that_nothing_reads_is_still_one(tmp_path):
    outputs, info = exported(tmp_path, lambda p, x, y: x, {}, X, X)
    assert info.inputs == ("x", "y")
    assert_same(outputs, X)


def unknown(x):
    return jax.lax.linalg.cholesky(x @ x.T)


FAILING = {
    "unknown primitive": (
        unknown,
        r"no rule for the primitive `cholesky` of \(float32\[2,2\]\).* at .*test_onnx_files.py:\d+:\d+ \(unknown\)",
    ),
    "unknown within a loop": (
        lambda x: jax.lax.map(lambda r: jax.lax.lgamma(r), jnp.concatenate(4 * [x])),
        "`lgamma`.*test_onnx_files",
    ),
    "callback": (lambda x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct((2, 3), "float32"), x), "`pure_callback`"),
    "print": (lambda x: (jax.debug.print("{}", x), x)[1], "`debug_"),
    "random bits": (
        lambda x: jax.random.normal(jax.random.wrap_key_data(x[0, :2].astype(jnp.uint32)), (3,)),
        "`random_wrap`",
    ),
    "complex": (lambda x: jnp.abs(x + 1j), "no values of dtype complex64"),
}


@pytest.mark.parametrize("name", FAILING)
def test_what_cannot_be_written_is_named(name, tmp_path):
    function, message = FAILING[name]
    with pytest.raises(NotImplementedError, match=message) as caught:
        save_onnx(tmp_path / "m.onnx", lambda _, x: function(x), {}, X)
    assert "test_onnx_files.py" in "".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert not list(tmp_path.iterdir())


def test_a_key_is_no_input(tmp_path):
    with pytest.raises(NotImplementedError, match="no values of dtype key<fry>") as caught:
        save_onnx(tmp_path / "m.onnx", lambda _, key: jax.random.normal(key, (3,)), {}, jax.random.key(0))
    assert "input 'key'" in caught.value.__notes__


def test_parameters_have_numbers_and_compressed_arrays_are_parameters(tmp_path):
    with pytest.raises(ValueError, match="Leaf 'w' is abstract"):
        save_onnx(tmp_path / "m.onnx", multiplied, jax.eval_shape(lambda: W), X)
    small, _ = jc.quantization.quantize(W, jc.quantization.QuantSpec(bits=8))
    with pytest.raises(ValueError, match="Input 'params/w' is a compressed array"):
        save_onnx(tmp_path / "m.onnx", lambda x, params: multiplied(params, x), X, small)


def test_without_onnx_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxcompress\[onnx\]'"):
        save_onnx(tmp_path / "m.onnx", multiplied, W, X)


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no directory .*none' to write 'm.onnx' to"):
        save_onnx(tmp_path / "none" / "m.onnx", multiplied, W, X)


def test_an_older_file_stays_where_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    save_onnx(path, multiplied, W, X)
    before = path.read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_onnx(path, lambda p, x: multiplied(p, x) + 1, W, X, overwrite=True)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"]


def test_a_new_file_is_as_readable_as_any(tmp_path):
    save_onnx(tmp_path / "m.onnx", multiplied, W, X)
    (tmp_path / "other").write_text("")
    assert (tmp_path / "m.onnx").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_more_constants_than_a_message_holds_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(model_file, "_MOST_INSIDE", 1000)
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32), "v": jnp.arange(1200.0)}
    outputs, info = exported(tmp_path, lambda p, x: (multiplied(p, x), p["v"] + x[0, 0]), params, X)
    assert_same(outputs, (multiplied(params, X), params["v"] + X[0, 0]))
    files = {entry.name: entry.stat().st_size for entry in tmp_path.iterdir()}
    assert set(files) == {"model.onnx", "model.onnx.data"}
    assert files["model.onnx.data"] >= 4800 > files["model.onnx"]
    assert info.nbytes == sum(files.values())


def test_the_file_passes_the_checks_of_onnx(tmp_path):
    import onnx

    def apply(params, x):
        return jax.lax.scan(lambda c, r: (jnp.where(r.sum() > 0, c + r, c), c), x[0], jnp.concatenate(4 * [x]))

    info = save_onnx(tmp_path / "m.onnx", apply, {}, X)
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    assert info.opset == 21
    assert info.nbytes == (tmp_path / "m.onnx").stat().st_size


def test_equal_constants_are_stored_once(tmp_path):
    table = np.random.default_rng(0).normal(size=(100, 50)).astype(np.float32)
    params = {"a": jnp.asarray(table), "b": jnp.asarray(table), "t": jnp.asarray(table.T)}

    def apply(params, x):
        return x @ params["a"] + x @ params["b"] + (x @ params["t"].T) + params["a"].reshape(-1)[:50]

    x = np.ones((1, 100), np.float32)
    outputs, info = exported(tmp_path, lambda p, x: apply(p, x[0]), params, x)
    assert_same(outputs, apply(params, x[0]), rtol=1e-4, atol=1e-4)
    assert info.nbytes < 2 * table.nbytes + 3000


def test_partial_functions_and_methods(tmp_path):
    apply = functools.partial(lambda scale, params, x: scale * multiplied(params, x), 2.0)
    outputs, info = exported(tmp_path, apply, W, X)
    assert info.inputs == ("x",)
    assert_same(outputs, 2 * multiplied(W, X))


def test_weights_are_not_widened_in_the_file(tmp_path):
    params = {"w": jnp.ones((200, 300), jnp.bfloat16) * 1.5}
    x = np.ones((2, 200), np.float32)
    outputs, info = exported(tmp_path, lambda p, x: x @ p["w"].astype(jnp.float32), params, x)
    assert_same(outputs, [np.full((2, 300), 300, np.float32)])
    # All entries are equal, so that one number is stored.
    assert info.nbytes < 1000
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(200, 300)), jnp.bfloat16)}
    outputs, info = exported(tmp_path, lambda p, x: x @ p["w"].astype(jnp.float32), params, x)
    assert_same(outputs, x @ params["w"].astype(jnp.float32), rtol=1e-4, atol=1e-4)
    assert info.nbytes < params["w"].nbytes + 1000
