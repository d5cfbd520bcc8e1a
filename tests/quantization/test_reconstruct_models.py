"""`reconstruct` on Equinox modules, kernels on the left, shared ones, and stacks in loops of Python."""

from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress._src.calibration.layer_by_layer import layer_by_layer
from jaxcompress._src.calibration.sites import kernels_at_work
from jaxcompress.calibration import input_statistics
from jaxcompress.quantization import QuantSpec, correct_biases, gptq, quantize, reconstruct

RNG = np.random.default_rng(7)
SPEC = QuantSpec(bits=3)
ROWS, WIDTH = 64, 8


def _normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


# Correlated inputs: where GPTQ and its relatives have something to win.
X = _normal(ROWS, 3) @ _normal(3, WIDTH) + 0.1 * _normal(ROWS, WIDTH)


def _errors(apply, params):
    """Of the model's output, for rounding to nearest, GPTQ and `reconstruct`; float64 norms."""
    dense = np.asarray(apply(params, X), np.float64)
    layouts = jc.trace.layouts(apply, params, X)
    found, info = reconstruct(apply, params, [(X,)], SPEC)
    trees = {
        "nearest": quantize(params, SPEC, layouts=layouts)[0],
        "gptq": gptq(params, input_statistics(apply, params, [(X,)]), SPEC, layouts=layouts)[0],
        "reconstruct": found,
    }
    outputs = {name: np.asarray(apply(jc.materialize(tree), X), np.float64) for name, tree in trees.items()}
    return {name: np.linalg.norm(out - dense) / np.linalg.norm(dense) for name, out in outputs.items()}, found, info


def _sites(apply, paths, params, **options):
    found = []
    for stop in layer_by_layer(apply, paths, [params], [(X,)], **options):
        found.append(SimpleNamespace(kernel=stop.kernel, bias=stop.bias, inputs=stop.rows(0, 0).inputs))
    return found


def _wide(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


def test_an_equinox_module():
    module = eqx.nn.MLP(WIDTH, 5, 12, 2, key=jax.random.key(0))
    params, static = eqx.partition(module, eqx.is_array)

    def apply(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    kernels = [f"layers/{i}/weight" for i in range(3)]
    sites = _sites(apply, kernels, params)
    assert [(site.kernel.name, site.bias.path) for site in sites] == [
        (name, name.replace("weight", "bias")) for name in kernels
    ]
    (x,) = _wide(X)
    for site, layer in zip(sites, params.layers, strict=True):
        np.testing.assert_allclose(site.inputs, x, rtol=1e-4, atol=1e-5)
        weight, bias = _wide(layer.weight, layer.bias)
        x = np.maximum(x @ weight.T + bias, 0)
    errors, found, info = _errors(apply, params)
    assert errors["reconstruct"] < min(errors["gptq"], errors["nearest"])
    assert list(info) == kernels
    # The biases were fitted, too.
    assert all(np.any(a.bias != b.bias) for a, b in zip(found.layers, params.layers, strict=True))


def test_a_kernel_on_the_left_becomes_what_its_transpose_does_on_the_right():
    w, v, b = _normal(6, WIDTH), _normal(5, 6), _normal(6)

    def left(params, x):
        hidden = jnp.tanh((params["w"] @ x.T).T + params["b"][None])
        return (params["v"] @ hidden.T).T + x[:, :5]

    def right(params, x):
        return jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"] + x[:, :5]

    found, info = reconstruct(left, {"w": w, "v": v, "b": b}, [(X,)], SPEC)
    expected, other = reconstruct(right, {"w": w.T, "v": v.T, "b": b}, [(X,)], SPEC)
    for name in "wv":
        np.testing.assert_array_equal(found[name].codes(), expected[name].codes().T)
        np.testing.assert_allclose(info[name].error or 0, other[name].error or 1, rtol=1e-4)
    np.testing.assert_allclose(found["b"], expected["b"], rtol=1e-4, atol=1e-5)
    # One vector: no rows but one, outputs first.
    (site,) = _sites(lambda p, x: p["w"] @ x[0] + p["b"], ["w"], {"w": w, "b": b})
    assert (site.inputs.shape, site.bias.path) == ((1, WIDTH), "b")


def _shared(params, x):
    for i in range(3):
        x = x + jnp.tanh(x @ params["up"] + params["bias"][None]) @ params["down"] + params[f"own{i}"][None]
    return x


def test_a_kernel_that_all_layers_share_is_fitted_to_all_of_them():
    params = {"up": _normal(WIDTH, 12), "bias": _normal(12), "down": _normal(12, WIDTH) / 4}
    params |= {f"own{i}": _normal(WIDTH) for i in range(3)}
    assert [part.name for part in kernels_at_work(_shared, params, X, repeated="first")] == ["up", "down"]
    assert kernels_at_work(_shared, params, X) == []
    (x,), inputs = _wide(X), []
    up, bias, down = _wide(params["up"], params["bias"], params["down"])
    for i in range(3):
        inputs.append(x)
        x = x + np.tanh(x @ up + bias) @ down + np.asarray(params[f"own{i}"], np.float64)
    sites = _sites(_shared, ["up"], params, repeated="each")
    for site, wanted in zip(sites, inputs, strict=True):
        np.testing.assert_allclose(site.inputs, wanted, rtol=1e-4, atol=1e-4)
    errors, found, info = _errors(_shared, params)
    assert errors["reconstruct"] < min(errors["gptq"], errors["nearest"])
    # Its error is that over the rows of all three uses, which nothing before it has changed.
    rows = np.concatenate(inputs)
    (after,) = _wide(jc.materialize(found["up"]))
    wanted = np.linalg.norm(rows @ (after - up)) / np.linalg.norm(rows @ up)
    np.testing.assert_allclose(info["up"].error or 0, wanted, rtol=0.05)
    assert all(found[f"own{i}"] is params[f"own{i}"] for i in range(3))


def test_biases_of_their_own_behind_a_shared_kernel_are_corrected_one_by_one():
    params = {"w": _normal(WIDTH, WIDTH) / 3, "b0": _normal(WIDTH), "b1": _normal(WIDTH)}

    def apply(params, x):
        return jnp.tanh(x @ params["w"] + params["b0"][None]) @ params["w"] + params["b1"][None]

    small, _ = quantize(params, QuantSpec(bits=2), select=jc.tree.by_path("w"))
    corrected, shifts = correct_biases(apply, params, small, [(X,)])
    assert list(shifts) == ["w, b0", "w, b1"]
    means = [np.asarray(apply(jc.materialize(tree), X), np.float64).mean(axis=0) for tree in (params, corrected)]
    np.testing.assert_allclose(*means, atol=1e-5)


def test_entries_cut_out_in_a_loop_of_python_are_those_of_a_scan():
    params = {"layers": _normal(3, WIDTH, WIDTH) / 3}

    def loop(params, x):
        for i in range(3):
            x = x + jnp.tanh(x @ params["layers"][i])
        return x

    def scanned(params, x):
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, params["layers"])[0]

    found, info = reconstruct(loop, params, [(X,)], SPEC)
    expected, _ = reconstruct(scanned, params, [(X,)], SPEC)
    assert list(info) == [f"layers[{i}]" for i in range(3)]
    np.testing.assert_array_equal(found["layers"].codes(), expected["layers"].codes())


def _unusual(params, x):
    x = x @ params["plain"]
    x = jax.lax.cond(x.sum() > 0, lambda: x @ params["branch"], lambda: x)
    x = jnp.einsum("en,eno->eo", jnp.stack([x.sum(0)] * 2), params["experts"])
    return x @ params["stack"][0]


def test_what_cannot_be_fitted_is_named_all_at_once():
    params = {"plain": _normal(WIDTH, WIDTH), "branch": _normal(WIDTH, WIDTH)}
    params |= {"experts": _normal(2, WIDTH, WIDTH), "stack": _normal(2, WIDTH, WIDTH)}
    named = (
        r"(?s)'branch'(: it)? is used as a whole inside a `cond`.*'experts'(: it)? must be in a plain matmul.*"
        r"'stack'(: it)? is a stack whose entries \[\[1\]\] are in no matmul"
    )
    with pytest.warns(jc.trace.LeftOutWarning, match=named):
        found, info = reconstruct(_unusual, params, [(X,)], SPEC)
    assert list(info) == ["plain", "branch", "experts", "stack"]
    assert all(found[name] is params[name] and info[name].note for name in ("branch", "experts", "stack"))
    assert not info["plain"].note
    with pytest.raises(ValueError, match=named):
        reconstruct(_unusual, params, [(X,)], SPEC, select=jc.tree.by_path(".*"))
