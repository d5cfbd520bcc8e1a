"""Least squares against float64 `lstsq`, kernel after kernel, in a residual model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress._src.calibration.layer_by_layer import layer_by_layer
from jaxcompress._src.units.shrink import mask_units
from jaxcompress.quantization import QuantSpec, quantize
from jaxcompress.structured import UnitGroup, UnitSlices, refit, shrink

WIDTH, INNER, BLOCKS = 4, (6, 10), 2
KEEP = {"b0": np.array([1, 0, 1]), "b1": np.array([0, 1, 1, 0, 1])}  # units of two inner features


def _groups(axis=0):
    return [
        UnitGroup(
            name=f"b{i}",
            count=INNER[i] // 2,
            slices=(
                UnitSlices(path=f"{i}/up", axis=1, width=2),
                UnitSlices(path=f"{i}/down", axis=axis, width=2, gated=True),
            ),
        )
        for i in range(BLOCKS)
    ]


def apply(params, x):
    """Blocks h + tanh(h U) W + b, over (batch, tokens, features)."""
    for i in range(BLOCKS):
        block = params[str(i)]
        written = jnp.tanh(x @ block["up"]) @ block["down"] + block["bias"].reshape(1, 1, -1)
        x = written + x
    return x


def transposed(params, x):
    """The same with kernels stored (out, in), as in Hugging Face Flax GPT-2."""
    turned = {i: block | {"down": block["down"].T} for i, block in params.items()}
    return jax.jit(apply)(turned, x)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return {
        str(i): {
            "up": jnp.asarray(rng.normal(size=(WIDTH, INNER[i])), jnp.float32),
            "down": jnp.asarray(rng.normal(size=(INNER[i], WIDTH)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=WIDTH), jnp.float32),
        }
        for i in range(BLOCKS)
    }


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(1)
    return [(jnp.asarray(rng.normal(size=(n, 5, WIDTH)), jnp.float32),) for n in (6, 3)]


def _rows_of(keep):
    return np.flatnonzero(np.repeat(np.asarray(keep), 2))


def _reference(params, x, *, ridge, fit, bias=True):
    """Fits every block by `lstsq` on the rows themselves, with the ridge as further rows."""
    blocks = jax.tree.map(np.float64, params)
    dense, pruned, found = x, x, {}
    for i in range(BLOCKS):
        block, kept = blocks[str(i)], _rows_of(KEEP[f"b{i}"])
        dense = dense + np.tanh(dense @ block["up"]) @ block["down"] + block["bias"]
        inner = np.tanh(pruned @ block["up"])[:, kept]
        target = dense - pruned
        hold = np.sqrt(ridge * np.square(inner).sum(0).mean())
        start = block["down"][kept]
        if fit == "rows":
            solved, new = _lstsq(inner, target, hold, start, None if bias else block["bias"])
        else:
            units = np.repeat(np.arange(len(kept) // 2), 2)
            parts = [inner[:, units == u] @ start[units == u] for u in range(len(kept) // 2)]
            held = [hold * np.linalg.norm(start[units == u]) for u in range(len(parts))]
            z, new = _gates(parts, target, held, None if bias else block["bias"])
            solved = start * z[units][:, None]
        pruned = pruned + inner @ solved + new
        full = np.zeros_like(block["down"])
        full[kept] = solved
        found[str(i)] = full, new, np.square(dense - pruned).sum()
    return found


def _lstsq(inner, target, hold, start, bias):
    ones = np.ones((len(inner), 0 if bias is not None else 1))
    held = np.concatenate([hold * np.eye(inner.shape[1]), np.zeros((inner.shape[1], ones.shape[1]))], axis=1)
    left = np.concatenate([np.concatenate([inner, ones], axis=1), held])
    right = np.concatenate([target - (0 if bias is None else bias), hold * start])
    solved = np.linalg.lstsq(left, right, rcond=None)[0]
    return solved[: inner.shape[1]], solved[-1] if bias is None else bias


def _gates(parts, target, held, bias):
    outputs = target.shape[1]
    columns = [part.ravel() for part in parts]
    if bias is None:
        columns += list(np.tile(np.eye(outputs), (len(target), 1)).T)
    right = (target - (0 if bias is None else bias)).ravel()
    ridge = np.zeros((len(parts), len(columns)))
    ridge[:, : len(parts)] = np.diag(held)
    left = np.concatenate([np.stack(columns, axis=1), ridge])
    solved = np.linalg.lstsq(left, np.concatenate([right, held]), rcond=None)[0]
    return solved[: len(parts)], solved[len(parts) :] if bias is None else bias


@pytest.mark.parametrize("fit", ["rows", "gates"])
@pytest.mark.parametrize(("ridge", "bias"), [(0.0, True), (0.1, True), (0.1, False)])
def test_every_kernel_is_the_least_squares_solution(params, batches, fit, ridge, bias):
    found, info = refit(apply, params, _groups(), KEEP, batches, fit=fit, ridge=ridge, bias=bias)
    x = np.concatenate([np.float64(batch).reshape(-1, WIDTH) for (batch,) in batches])
    for i, (kernel, new, _) in _reference(params, x, ridge=ridge, fit=fit, bias=bias).items():
        np.testing.assert_allclose(found[i]["down"], kernel, rtol=0, atol=2e-4)
        np.testing.assert_allclose(found[i]["bias"], new, rtol=0, atol=2e-4)
        assert found[i]["up"] is params[i]["up"]
    assert info.keys() == {"0/down", "1/down"}
    assert all(of["error"] < of["error_before"] for of in info.values())


def test_the_error_that_is_reported_is_that_of_the_rows(params, batches):
    _, info = refit(apply, params, _groups(), KEEP, batches, ridge=0.0)
    x = np.concatenate([np.float64(batch).reshape(-1, WIDTH) for (batch,) in batches])
    block = jax.tree.map(np.float64, params["0"])
    target = np.tanh(x @ block["up"]) @ block["down"] + block["bias"]
    energy = np.square(target - block["bias"]).sum()
    (_, _, error) = _reference(params, x, ridge=0.0, fit="rows")["0"]
    np.testing.assert_allclose(info["0/down"]["error"], np.sqrt(error / energy), rtol=1e-3)
    masked = block["down"] * np.repeat(KEEP["b0"], 2)[:, None]
    before = np.square(target - np.tanh(x @ block["up"]) @ masked - block["bias"]).sum()
    np.testing.assert_allclose(info["0/down"]["error_before"], np.sqrt(before / energy), rtol=1e-3)


@pytest.mark.parametrize("fit", ["rows", "gates"])
def test_transposed_kernels_give_the_transposed_solution(params, batches, fit):
    expected, _ = refit(apply, params, _groups(), KEEP, batches, fit=fit)
    turned = {i: block | {"down": block["down"].T} for i, block in params.items()}
    found, _ = refit(transposed, turned, _groups(axis=1), KEEP, batches, fit=fit)
    for i in found:
        np.testing.assert_allclose(found[i]["down"].T, expected[i]["down"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found[i]["bias"], expected[i]["bias"], rtol=0, atol=1e-5)


def test_shrinking_keeps_the_function_that_was_fitted(params, batches):
    found, _ = refit(apply, params, _groups(), KEEP, batches)
    small = shrink(found, _groups(), KEEP)
    assert small["1"]["down"].shape == (6, WIDTH)
    (x,) = batches[0]
    np.testing.assert_allclose(apply(small, x), apply(found, x), rtol=0, atol=1e-5)
    plain = apply(mask_units(params, _groups(), KEEP), x)
    assert jnp.square(apply(small, x) - apply(params, x)).sum() < 0.5 * jnp.square(plain - apply(params, x)).sum()


def test_all_units_kept_is_the_dense_model_and_none_a_constant(params, batches):
    all_of_them = {name: np.ones(len(kept), bool) for name, kept in KEEP.items()}
    found, info = refit(apply, params, _groups(), all_of_them, batches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), found, params)
    assert max(of["error"] for of in info.values()) < 1e-3
    none = {"b0": np.zeros(3, bool)}
    found, info = refit(apply, params, _groups(), none, batches)
    assert not found["0"]["down"].any()
    assert found["1"]["down"] is params["1"]["down"]
    x = np.concatenate([np.float64(batch).reshape(-1, WIDTH) for (batch,) in batches])
    written = np.tanh(x @ np.float64(params["0"]["up"])) @ np.float64(params["0"]["down"])
    np.testing.assert_allclose(found["0"]["bias"], written.mean(0) + np.float64(params["0"]["bias"]), atol=1e-4)
    rest = np.linalg.norm(written - written.mean(0)) / np.linalg.norm(written)
    np.testing.assert_allclose(info["0/down"]["error"], rest, atol=1e-4)


def test_gates_are_clipped():
    """The kept unit is a hundredth of the removed one."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 1)), jnp.float32) * jnp.array([[0.01, 1.0]])
    group = UnitGroup(name="in", count=2, slices=(UnitSlices(path="w", axis=0, gated=True),))
    arguments = (lambda p, x: x @ p["w"], {"w": jnp.ones((2, 1))}, [group], {"in": [True, False]}, [(x,)])
    free, _ = refit(*arguments, fit="gates", ridge=0.0, limit=1000.0)
    clipped, _ = refit(*arguments, fit="gates", ridge=0.0)
    np.testing.assert_allclose(free["w"], [[101.0], [0.0]], rtol=1e-3)
    np.testing.assert_allclose(clipped["w"], [[10.0], [0.0]], rtol=1e-6)


@pytest.mark.parametrize("fit", ["rows", "gates"])
def test_inputs_that_are_zero_or_equal_are_no_error(fit):
    """A singular matrix, without a ridge."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 1)), jnp.float32) * jnp.array([[0.0, 1.0, 1.0, 1.0]])
    group = UnitGroup(name="in", count=4, slices=(UnitSlices(path="w", axis=0, gated=True),))
    params, keep = {"w": jnp.ones((4, 1))}, {"in": [True, True, True, False]}
    found, info = refit(lambda p, x: x @ p["w"], params, [group], keep, [(x,)], fit=fit, ridge=0.0)
    assert np.isfinite(found["w"]).all()
    np.testing.assert_allclose(x @ found["w"], x @ params["w"], rtol=0, atol=1e-4)
    assert info["w"]["error"] < 3e-3
    # Nothing is known of the first input: its weight stays.
    np.testing.assert_array_equal(found["w"][0], params["w"][0])


def test_rows_that_do_not_count_may_be_anything(params, batches):
    (x,) = batches[0]
    mask = jnp.arange(5)[None] < jnp.array([5, 3, 1, 4, 2, 5])[:, None]
    spoiled = jnp.where(mask[..., None], x, jnp.nan)
    alone = jnp.asarray(np.asarray(x)[np.asarray(mask)])[None]
    expected, _ = refit(apply, params, _groups(), KEEP, [(alone,)])
    found, _ = refit(
        lambda p, x, mask: apply(p, x), params, _groups(), KEEP, [(spoiled, mask)], row_mask=lambda x, mask: mask
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), found, expected)


def test_sublayers_that_go_keep_a_bias_of_zero(params, batches):
    slices = [UnitSlices(path=f"{i}/down", axis=0, unit=i, gated=True) for i in range(2)]
    slices += [UnitSlices(path=f"{i}/bias", axis=None, unit=i, gated=True) for i in range(2)]
    layers = UnitGroup(name="layers", count=2, slices=tuple(slices))
    keep = KEEP | {"layers": [False, True]}
    found, _ = refit(apply, params, [*_groups(), layers], keep, batches)
    assert not found["0"]["bias"].any()
    assert not found["0"]["down"].any()
    assert found["1"]["bias"].any()


def test_bfloat16_kernels_stay_bfloat16(params, batches):
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    inputs = [(x.astype(jnp.bfloat16),) for (x,) in batches]
    found, info = refit(apply, halved, _groups(), KEEP, inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
    assert all(of["error"] < of["error_before"] for of in info.values())


def _looped(params, x):
    return jax.lax.scan(lambda h, _: (h + jnp.tanh(h @ params["0"]["up"]) @ params["0"]["down"], None), x, length=2)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"apply": _looped}, "'0/down' is used as a whole inside a `scan`"),
        ({"apply": lambda p, x: x}, "'0/down' is in no matmul of the model"),
        ({"apply": lambda p, x: (x @ p["0"]["up"] @ p["0"]["down"]) @ p["0"]["down"].T}, "more than one matmul"),
        (
            {"apply": lambda p, x: jnp.einsum("nio,io->on", jnp.ones((2, *p["0"]["down"].shape)), p["0"]["down"])},
            "must be in a plain matmul; found .* batched over",
        ),
        ({"batches": []}, "`batches` is empty"),
        ({"ridge": -1.0}, "`ridge` must not be negative, got -1.0"),
        ({"limit": 0.0}, "`limit` must be above 0, got 0.0"),
        ({"keep": {}}, "No group in `keep` has gated slices"),
        ({"keep": {"b9": [True]}}, "`keep` names the unit group 'b9'"),
        ({"row_mask": lambda x: jnp.ones(7)}, "`row_mask` gives 7 entries; the input of '0/down' has 30 rows"),
        ({"row_mask": lambda x: jnp.zeros(30)}, "`row_mask` leaves no row of the input of '0/down'"),
        ({"batches": [(jnp.full((6, 5, WIDTH), jnp.nan),)]}, "What goes into '0/down', .* holds NaN or Inf"),
    ],
)
def test_bad_input_is_named(params, batches, change, message):
    arguments = {"apply": apply, "batches": batches[:1], "keep": {"b0": KEEP["b0"]}} | change
    with pytest.raises(ValueError, match=message):
        refit(arguments.pop("apply"), params, _groups(), arguments.pop("keep"), arguments.pop("batches"), **arguments)


def test_wrong_axis_two_owners_and_compressed_leaves_are_named(params, batches):
    groups = _groups()
    outputs = UnitGroup(name="out", count=WIDTH, slices=(UnitSlices(path="0/down", axis=1, gated=True),))
    with pytest.raises(ValueError, match="on axis 1 of '0/down', but the model sums over axis 0"):
        refit(apply, params, [outputs], {"out": [True, False, True, True]}, batches)
    keep = {"b0": KEEP["b0"], "out": [True, False, True, True]}
    with pytest.raises(ValueError, match="'0/down' has gated slices of 'b0' and of 'out'"):
        refit(apply, params, [*groups, outputs], keep, batches)
    with pytest.raises(ValueError, match="is compressed"):
        refit(apply, quantize(params, QuantSpec(bits=8))[0], groups, KEEP, batches)


def test_the_model_stops_at_its_kernels_and_goes_on_with_others(params, batches):
    (x,) = batches[0]
    h, seen = np.float64(x).reshape(-1, WIDTH), []
    stop: Any
    for i, stop in enumerate(layer_by_layer(apply, ["0/down", "1/down"], [params], [(x,)])):
        up, rows = np.float64(params[str(i)]["up"]), stop.rows(0, 0)
        np.testing.assert_allclose(rows.inputs, np.tanh(h @ up), rtol=0, atol=1e-5)
        np.testing.assert_allclose(rows.residual, h, rtol=0, atol=1e-4)
        assert (stop.kernel.path, stop.bias.path, stop.kernel.input_axes) == (f"{i}/down", f"{i}/bias", (0,))
        reply = np.full((INNER[i], WIDTH), 0.1), np.full(WIDTH, 0.2)
        stop.replace(*reply)
        h = h + np.tanh(h @ up) @ reply[0] + reply[1]
        seen.append(i)
    assert seen == list(range(BLOCKS))


def test_an_output_that_is_added_to_nothing():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    run = layer_by_layer(lambda p, x: jnp.sin(x @ p["a"]) @ p["b"], ["a", "b"], [params], [(jnp.ones((3, 2)),)])
    first = next(run)
    assert (first.kernel.name, first.rows(0, 0).residual, first.bias) == ("a", None, None)
    first.replace(np.zeros((2, 2)), np.zeros(2))
    np.testing.assert_array_equal(next(run).rows(0, 0).inputs, np.zeros((3, 2)))


def test_units_of_several_runs_have_one_gate():
    """Channels after flattening (positions, channels): unit u owns rows u, u + 2 and u + 4."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 6))
    x[:, 1::2] = 2 * x[:, 0::2] + 0.1 * x[:, 1::2]
    kernel = rng.normal(size=(6, 4))
    part = UnitSlices(path="w", axis=0, repeat=3, gated=True)
    group = UnitGroup(name="channels", count=2, slices=(part,))
    options = {"fit": "gates", "ridge": 0.0, "bias": False}
    params, batches = {"w": jnp.asarray(kernel, jnp.float32)}, [(jnp.asarray(x, jnp.float32),)]
    fitted, _ = refit(lambda p, x: x @ p["w"], params, [group], {"channels": [True, False]}, batches, **options)
    alone = x[:, 0::2] @ kernel[0::2]
    gate = (alone * (x @ kernel)).sum() / (alone**2).sum()
    np.testing.assert_allclose(fitted["w"][0::2], gate * kernel[0::2], rtol=1e-4)
    np.testing.assert_array_equal(fitted["w"][1::2], 0)


@pytest.mark.parametrize("turned", [False, True])
def test_another_group_may_cut_the_outputs_of_a_kernel(turned):
    rng = np.random.default_rng(0)
    first, second = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32), jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(60, 6)) @ rng.normal(size=(6, 6)), jnp.float32)
    inputs = UnitGroup(name="in", count=6, slices=(UnitSlices(path="w", axis=int(turned), gated=True),))
    cut = UnitSlices(path="w", axis=1 - int(turned))
    hidden = UnitGroup(name="hidden", count=4, slices=(cut, UnitSlices(path="v", axis=0, gated=True)))
    keep = {"in": [True] * 4 + [False] * 2, "hidden": [True, True, False, True]}

    def apply(params, x):
        return jnp.tanh(x @ (params["w"].T if turned else params["w"])) @ params["v"]

    params = {"w": first.T if turned else first, "v": second}
    fitted, info = refit(apply, params, [inputs, hidden], keep, [(x,)], ridge=0.0)
    kernel = np.asarray(fitted["w"].T if turned else fitted["w"])
    np.testing.assert_array_equal(kernel[4:], 0)
    wanted = np.linalg.lstsq(np.asarray(x[:, :4], np.float64), np.asarray(x @ first, np.float64), rcond=None)[0]
    np.testing.assert_allclose(kernel[:4, [0, 1, 3]], wanted[:, [0, 1, 3]], rtol=1e-3, atol=1e-4)
    assert all(entry["error"] <= entry["error_before"] for entry in info.values())
    small = shrink(fitted, [inputs, hidden], keep)
    np.testing.assert_allclose(apply(small, x[:, :4]), apply(fitted, x), rtol=1e-4, atol=1e-4)
