"""Units of a Hugging Face Flax GPT-2: kernels (out, in), query, key and value in one. The model is written out here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress._src.units.shrink import mask_units
from jaxcompress.models import gpt2_units
from jaxcompress.structured import discover_units, refit, shrink

LAYERS, HEADS, SIZE, INNER = 2, 3, 4, 10
HIDDEN = HEADS * SIZE


def _norm(x, of):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * of["scale"].reshape(1, 1, -1)


def _dense(x, of):
    return x @ of["kernel"].T + of["bias"].reshape(1, 1, -1)


def gpt2(params, x):
    """Pre-norm blocks; the number of heads is what `c_attn` has left."""
    for layer in range(LAYERS):
        block = params["transformer"]["h"][str(layer)]
        fused = _dense(_norm(x, block["ln_1"]), block["attn"]["c_attn"])
        heads = fused.shape[-1] // (3 * SIZE)
        q, k, v = (part.reshape(*x.shape[:2], heads, SIZE) for part in jnp.split(fused, 3, axis=-1))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / SIZE**0.5
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))[None, None]
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
        context = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], heads * SIZE)
        x = _dense(context, block["attn"]["c_proj"]) + x
        inner = jax.nn.gelu(_dense(_norm(x, block["ln_2"]), block["mlp"]["c_fc"]))
        x = _dense(inner, block["mlp"]["c_proj"]) + x
    return x


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)

    def dense(outputs, inputs):
        draw = lambda *shape: jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32)  # noqa: E731
        return {"kernel": draw(outputs, inputs), "bias": draw(outputs)}

    def block():
        return {
            "ln_1": {"scale": jnp.ones(HIDDEN)},
            "attn": {"c_attn": dense(3 * HIDDEN, HIDDEN), "c_proj": dense(HIDDEN, HIDDEN)},
            "ln_2": {"scale": jnp.ones(HIDDEN)},
            "mlp": {"c_fc": dense(INNER, HIDDEN), "c_proj": dense(HIDDEN, INNER)},
        }

    return {"transformer": {"h": {str(layer): block() for layer in range(LAYERS)}}}


@pytest.fixture(scope="module")
def groups():
    return gpt2_units(num_layers=LAYERS, num_heads=HEADS, hidden_size=HIDDEN, inner_size=INNER)


KEEP = {
    "transformer/h/0/heads": np.array([True, False, True]),
    "transformer/h/1/heads": np.array([False, True, False]),
    "transformer/h/0/columns": np.arange(INNER) % 3 > 0,
    "transformer/h/1/columns": np.zeros(INNER, bool),
}


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, HIDDEN)), jnp.float32)


def test_the_units_are_those_of_the_program(params, groups, x):
    discovered = discover_units(gpt2, params, x)
    assert [(each.name, each.kind) for each in discovered[:2]] == [
        ("transformer/h/0/attn/c_attn/kernel", "heads"),
        ("transformer/h/0/mlp/c_fc/kernel", "columns"),
    ]
    names = {group.name: each.name for group, each in zip(groups, discovered, strict=True)}
    keep = {names[name]: kept for name, kept in KEEP.items()}
    jax.tree.map(np.testing.assert_array_equal, shrink(params, discovered, keep), shrink(params, groups, KEEP))
    masked = mask_units(params, discovered, keep)
    jax.tree.map(np.testing.assert_array_equal, masked, mask_units(params, groups, KEEP))


def test_masked_equals_shrunk(params, groups, x):
    small = shrink(params, groups, KEEP)
    run = jax.jit(gpt2)
    found, expected = run(small, x), run(mask_units(params, groups, KEEP), x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(np.asarray(expected - run(params, x))).max() > 0.1
    shapes = jax.tree.map(jnp.shape, small["transformer"]["h"])
    assert shapes["0"]["attn"]["c_attn"] == {"kernel": (24, 12), "bias": (24,)}
    assert shapes["0"]["attn"]["c_proj"] == {"kernel": (12, 8), "bias": (12,)}
    assert shapes["1"]["mlp"]["c_proj"] == {"kernel": (12, 0), "bias": (12,)}


def test_a_head_owns_three_runs_of_the_fused_kernel(params, groups):
    small = shrink(params, groups, {"transformer/h/0/heads": [False, True, False]})
    fused = params["transformer"]["h"]["0"]["attn"]["c_attn"]["kernel"]
    rows = np.concatenate([np.arange(4, 8) + part * HIDDEN for part in range(3)])
    np.testing.assert_array_equal(small["transformer"]["h"]["0"]["attn"]["c_attn"]["kernel"], fused[rows])


def test_least_squares_through_fused_and_transposed_kernels(params, groups, x):
    fitted, info = refit(gpt2, params, groups, KEEP, [(x,)])
    assert list(info) == [f"transformer/h/{i}/{name}/c_proj/kernel" for i in range(2) for name in ("attn", "mlp")]
    assert all(of["error"] <= of["error_before"] for of in info.values())
    run = jax.jit(gpt2)
    dense, masked = run(params, x), run(mask_units(params, groups, KEEP), x)
    after = run(shrink(fitted, groups, KEEP), x)
    assert jnp.square(after - dense).sum() < 0.5 * jnp.square(masked - dense).sum()


def test_sizes_that_do_not_fit_are_named(params):
    with pytest.raises(ValueError, match="`hidden_size`, 10, must be a multiple of `num_heads`, 3"):
        gpt2_units(num_layers=1, num_heads=3, hidden_size=10)
    with pytest.raises(ValueError, match="needs the leaf 'transformer/h/2/attn/c_attn/kernel'"):
        shrink(params, gpt2_units(num_layers=3, num_heads=3, hidden_size=12, inner_size=10), {})
