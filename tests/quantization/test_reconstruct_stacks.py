"""`reconstruct`, `correct_biases` on scanned stacks and kernels of three axes, against the same model written out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress._src.calibration.layer_by_layer import layer_by_layer
from jaxcompress._src.calibration.sites import kernels_at_work
from jaxcompress.quantization import QuantSpec, correct_biases, quantize, reconstruct

RNG = np.random.default_rng(3)
LAYERS, WIDTH, HEADS, INNER = 3, 8, 2, 12
SPEC = QuantSpec(bits=3, group_size=4, symmetric=False)
X = jnp.asarray(RNG.normal(size=(5, 7, WIDTH)), jnp.float32)


def _random(*shape):
    return jnp.asarray(RNG.normal(size=shape) / np.sqrt(WIDTH), jnp.float32)


def _layer(p, h):
    """Attention-like kernels with three axes, (D, H, K) and (H, K, D), then a pair of plain ones."""
    heads = jnp.einsum("btd,dhk->bthk", h, p["split"]) + p["split_bias"][None, None]
    h = h + jnp.einsum("bthk,hkd->btd", jnp.tanh(heads), p["merge"]) + p["merge_bias"][None, None]
    return h + jax.nn.gelu(h @ p["up"] + p["up_bias"][None, None]) @ p["down"] + p["down_bias"][None, None]


LAYER = {
    "split": (WIDTH, HEADS, 4),
    "split_bias": (HEADS, 4),
    "merge": (HEADS, 4, WIDTH),
    "merge_bias": (WIDTH,),
    "up": (WIDTH, INNER),
    "up_bias": (INNER,),
    "down": (INNER, WIDTH),
    "down_bias": (WIDTH,),
}
ORDER = ("split", "merge", "up", "down")


@pytest.fixture(scope="module")
def layers():
    return [{name: _random(*shape) for name, shape in LAYER.items()} for _ in range(LAYERS)]


def written_out(params, x):
    for layer in params["layers"]:
        x = _layer(layer, x)
    return x @ params["head"]


def scanned(params, x, *, axis=0, reverse=False, remat=False):
    layer = jax.checkpoint(_layer) if remat else _layer
    stacks = {name: jnp.moveaxis(leaf, axis, 0) for name, leaf in params["layers"].items()}
    x, _ = jax.lax.scan(lambda h, p: (layer(p, h), None), x, stacks, reverse=reverse)
    return x @ params["head"]


def _stacked(layers, *, axis=0, reverse=False):
    ordered = layers[::-1] if reverse else layers
    return jax.tree.map(lambda *parts: jnp.stack(parts, axis=axis), *ordered)


SCANS = [{}, {"axis": 1}, {"reverse": True}, {"remat": True}]


def _layers_of(tree, options):
    """The layers of a scanned model, first to last."""
    axis, reverse = options.get("axis", 0), options.get("reverse", False)
    stacks = {name: np.moveaxis(np.asarray(leaf), axis, 0) for name, leaf in tree["layers"].items()}
    found = [{name: stack[i] for name, stack in stacks.items()} for i in range(LAYERS)]
    return found[::-1] if reverse else found


@pytest.mark.parametrize("options", SCANS)
def test_the_layers_of_a_scan_become_what_they_do_written_out(layers, options):
    head = _random(WIDTH, 5)
    flat = {"layers": layers, "head": head}
    turned = {name: value for name, value in options.items() if name != "remat"}
    stack = {"layers": _stacked(layers, **turned), "head": head}
    batches = [(X[:2],), (X[2:],)]
    wanted, wanted_info = reconstruct(written_out, flat, batches, SPEC)
    found, info = reconstruct(lambda p, x: scanned(p, x, **options), stack, batches, SPEC)
    assert isinstance(found["layers"]["split"], jc.arrays.QuantizedArray)
    assert found["layers"]["split"].shape == stack["layers"]["split"].shape
    plain = jc.materialize(found)
    for mine, theirs in zip(_layers_of(plain, options), jc.materialize(wanted)["layers"], strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-4), mine, theirs)
    place = (lambda i: LAYERS - 1 - i) if options.get("reverse") else (lambda i: i)
    names = [f"layers/{name}[{place(i)}]" for i in range(LAYERS) for name in ORDER]
    assert list(info) == [*names, "head"]
    for i, name in ((0, "split"), (2, "down")):
        theirs = wanted_info[f"layers/{i}/{name}"]
        assert info[f"layers/{name}[{place(i)}]"].error == pytest.approx(theirs.error, rel=1e-3)
    run = jc.execute(lambda p, x: scanned(p, x, **options))
    np.testing.assert_allclose(run(found, X), scanned(plain, X, **options), atol=1e-4)


def test_the_fit_of_a_scan_is_closer_than_rounding_to_nearest(layers):
    stack = {"layers": _stacked(layers), "head": _random(WIDTH, 5)}
    layouts = jc.trace.layouts(scanned, stack, X)
    nearest = jc.materialize(quantize(stack, SPEC, layouts=layouts)[0])
    found, _ = reconstruct(scanned, stack, [(X,)], SPEC)
    wanted = scanned(stack, X)
    gaps = [float(jnp.linalg.norm(scanned(tree, X) - wanted)) for tree in (jc.materialize(found), nearest)]
    assert gaps[0] < 0.5 * gaps[1]


@pytest.mark.parametrize("options", SCANS)
def test_biases_of_a_scan_give_the_dense_means(layers, options):
    """The biases written out, each from float64 means of the model whose earlier biases are corrected."""
    turned = {name: value for name, value in options.items() if name != "remat"}
    stack = {"layers": _stacked(layers, **turned), "head": _random(WIDTH, 5)}
    kernels = {"layers": {name: name in ORDER for name in LAYER}, "head": False}
    run = lambda p, x: scanned(p, x, **options)  # noqa: E731
    layouts = jc.trace.layouts(run, stack, X)
    small, _ = quantize(stack, QuantSpec(bits=2), select=lambda _: kernels, layouts=layouts)
    corrected, shifts = correct_biases(run, stack, small, [(X[:2],), (X[2:],)])
    assert len(shifts) == LAYERS * len(ORDER)
    mine = _layers_of(jc.materialize(small), options)
    for i in range(LAYERS):
        for name in ORDER:
            gap = _reads(layers, i, name) - _reads(mine, i, name)
            mine[i][f"{name}_bias"] = mine[i][f"{name}_bias"] + gap.mean(axis=(0, 1))
    for found, wanted in zip(_layers_of(jc.materialize(corrected), options), mine, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-4), found, wanted)


def _reads(layers, last, kernel):
    """What `kernel` of one layer writes, with its bias and what it is added to, in float64."""
    h = np.float64(X)
    for i, layer in enumerate(layers):
        p = {name: np.float64(leaf) for name, leaf in layer.items()}
        heads = np.einsum("btd,dhk->bthk", h, p["split"]) + p["split_bias"]
        merged = h + np.einsum("bthk,hkd->btd", np.tanh(heads), p["merge"]) + p["merge_bias"]
        up = merged @ p["up"] + p["up_bias"]
        h = merged + np.asarray(jax.nn.gelu(jnp.asarray(up, jnp.float32)), np.float64) @ p["down"] + p["down_bias"]
        if i == last:
            return {"split": heads, "merge": merged, "up": up, "down": h}[kernel]
    raise AssertionError


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS, name="attention")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(WIDTH, name="down")(nn.relu(nn.Dense(INNER, name="up")(x))), None


class _Model(nn.Module):
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            nn.remat(_Block), variable_axes={"params": self.axis}, split_rngs={"params": True}, length=LAYERS
        )
        return nn.Dense(3, name="head")(stack(name="layers")(x, None)[0])


@pytest.mark.parametrize("axis", [0, 1])
def test_every_kernel_of_a_flax_scan_is_visited_in_order(axis):
    model = _Model(axis=axis)
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    apply = lambda p, x: model.apply({"params": p}, x)  # noqa: E731
    names = [part.name for part in kernels_at_work(apply, params, X)]
    inner = {"attention/query", "attention/key", "attention/value", "attention/out", "up", "down"}
    for i in range(LAYERS):
        assert set(names[6 * i : 6 * i + 6]) == {f"layers/{name}/kernel[{i}]" for name in inner}
        assert names[6 * i + 3 : 6 * i + 6] == [f"layers/{n}/kernel[{i}]" for n in ("attention/out", "up", "down")]
    assert names[6 * LAYERS :] == ["head/kernel"]
    found, info = reconstruct(apply, params, [(X,)], SPEC)
    assert list(info) == names
    wanted = apply(params, X)
    layouts = jc.trace.layouts(apply, params, X)
    kernels = lambda tree: jc.tree.map_with_path(lambda path, _: path.endswith("kernel"), tree)  # noqa: E731
    nearest, _ = quantize(params, SPEC, select=kernels, layouts=layouts)
    gaps = [float(jnp.linalg.norm(jc.execute(apply)(tree, X) - wanted)) for tree in (found, nearest)]
    assert gaps[0] < gaps[1]


@pytest.mark.parametrize("turned", [False, True])
def test_runs_of_a_stack_are_rounded_as_the_whole_of_it(turned):
    params = {"w": _random(4, WIDTH, WIDTH), "b": _random(4, WIDTH)}

    def whole(params, x):
        kernels = params["w"][::-1].astype(jnp.float32) if turned else params["w"]
        layers = kernels, params["b"]
        return jax.lax.scan(lambda h, p: (h + jnp.tanh(h @ p[0] + p[1][None, None]), None), x, layers)[0]

    def joined(params, x):
        return whole(jc.tree.join_stacks(params), x)

    runs = jc.tree.split_stacks(params, [1, 3], select=jc.tree.by_path("w"))
    wanted, known = reconstruct(whole, params, [(X,)], SPEC, bias=False)
    found, info = reconstruct(joined, runs, [(X,)], SPEC, bias=False)
    order = ["w/0:1[0]", "w/1:3[0]", "w/1:3[1]", "w/3:4[0]"]
    assert list(info) == (order[::-1] if turned else order)
    assert [entry.error for entry in info.values()] == [entry.error for entry in known.values()]
    kernels = jc.tree.join_stacks(jc.materialize(found))["w"]
    np.testing.assert_array_equal(kernels, wanted["w"].materialize())


def test_a_scan_that_runs_backwards_stops_at_its_last_entry_first():
    stack, x = _random(LAYERS, WIDTH, WIDTH), X[0]

    def once(params, x):
        def step(h, w):
            written = h @ w
            return h + written, written

        return jax.lax.scan(step, x, params["w"], reverse=True)

    seen, reply, h = [], None, np.float64(x)
    for stop in layer_by_layer(once, ["w"], [{"w": stack}], [(x,)]):
        seen.append(stop.kernel.name)
        h = h if reply is None else h + h @ reply
        np.testing.assert_allclose(stop.rows(0, 0).inputs, h, atol=1e-4)
        reply = np.full((WIDTH, WIDTH), 0.1 * len(seen))
        stop.replace(reply, np.zeros(WIDTH))
    assert seen == ["w[2]", "w[1]", "w[0]"]

    def twice(params, x):
        return jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w) @ w, None), x, params["w"])

    assert [part.name for part in kernels_at_work(twice, {"w": stack}, x)] == []
    with pytest.raises(ValueError, match="'w' is in more than one matmul"):
        kernels_at_work(twice, {"w": stack}, x, paths=["w"])


def test_a_bias_that_all_layers_share_stays(layers):
    params = {"w": _random(LAYERS, WIDTH, WIDTH), "bias": _random(WIDTH)}

    def apply(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w + params["bias"][None, None]), None), x, params["w"])[0]

    found, _ = reconstruct(apply, params, [(X,)], SPEC)
    np.testing.assert_array_equal(found["bias"], params["bias"])
    corrected, shifts = correct_biases(apply, params, found, [(X,)])
    assert shifts == {}
    np.testing.assert_array_equal(corrected["bias"], params["bias"])


def test_a_kernel_that_all_iterations_share_is_named():
    params = {"w": _random(WIDTH, WIDTH)}

    def apply(params, x):
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ params["w"]), None), x, length=2)[0]

    assert kernels_at_work(apply, params, X) == []
    with pytest.raises(ValueError, match="'w' is used as a whole inside a `scan`"):
        reconstruct(apply, params, [(X,)], SPEC, select=lambda _: {"w": True})
