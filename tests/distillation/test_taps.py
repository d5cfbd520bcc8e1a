"""Intermediate tensors by name, of models that know nothing of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxcompress.distillation import hidden_states, make_train_step, tap
from jaxcompress.quantization import QuantSpec, quantize

X = jax.random.normal(jax.random.key(0), (3, 4))
W = jax.random.normal(jax.random.key(1), (5, 4, 4))


def _tagged(params, x):
    """Tags at the top, in jit, remat of scan, scan of remat, and where none can be had."""

    @jax.jit
    def inner(x):
        return checkpoint_name(jnp.sin(x), "in_jit")

    def layer(x, w):
        x = checkpoint_name(jnp.tanh(x @ w), "layer")
        return x, x.sum()

    x = checkpoint_name(inner(x), "top")
    x, sums = jax.checkpoint(lambda x: jax.lax.scan(layer, x, params["w"], reverse=True))(x)
    x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["w"])
    x = jax.lax.cond(x.sum() > 0, lambda x: checkpoint_name(2 * x, "in_cond"), lambda x: x, x)
    x = jax.lax.while_loop(lambda x: x.sum() > 1e9, lambda x: checkpoint_name(x / 2, "in_while"), x)
    return {"y": x, "sums": sums}


def _by_hand(params, x):
    top = jnp.sin(x)
    x, first = top, []
    for w in params["w"][::-1]:
        x = jnp.tanh(x @ w)
        first.append(x)
    second = []
    for w in params["w"]:
        x = jnp.tanh(x @ w)
        second.append(x)
    return {"top": top, "layer": jnp.stack(first[::-1]), "layer[1]": jnp.stack(second)}


def test_tags_in_jit_remat_and_scan():
    params = {"w": W}
    expected = _by_hand(params, X)
    for run in (tap(_tagged, "top|layer"), jax.jit(tap(_tagged, "top|layer"))):
        outputs = run(params, X)
        assert set(outputs) == {"y", "sums", "top", "layer", "layer[1]"}
        for name, tensor in expected.items():
            np.testing.assert_allclose(outputs[name], tensor, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(outputs["sums"], _tagged(params, X)["sums"])
    (layers,) = [tap(_tagged, {"states": "layer"})(params, X)["states"]]
    assert [state.shape for state in layers] == [(5, 3, 4)] * 2


def test_gradients_go_through_taps():
    def loss(params, make):
        outputs = make(params, X)
        return (outputs["layer"] ** 2).sum() + outputs["layer[1]"].sum() + outputs["top"].sum()

    found = jax.jit(jax.grad(lambda params: loss(params, tap(_tagged, "top|layer"))))({"w": W})
    expected = jax.grad(lambda params: loss(params, _by_hand))({"w": W})
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-4, atol=1e-5)
    batched = jax.vmap(tap(_tagged, "layer"), in_axes=(None, 0))({"w": W}, jnp.stack([X, 2 * X]))
    np.testing.assert_allclose(batched["layer"][0], _by_hand({"w": W}, X)["layer"], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_had_is_listed():
    with pytest.raises(ValueError, match=r"'in_\(cond\|while\)' matches no tensor") as error:
        tap(lambda params, x: _tagged(params, x), "in_(cond|while)")({"w": W}, X)
    assert str(error.value).endswith(
        "There are:\n  in_jit\n  top\n  layer\n"
        "Inside of `while`, `cond` and the like, where none can be had:\n  in_cond\n  in_while"
    )
    with pytest.raises(ValueError, match=r"'absent' matches no tensor\. There are: nothing"):
        tap(lambda x: {"y": x}, "absent")(X)
    with pytest.raises(ValueError, match=r"The model has an output 'y' already; its outputs are \['sums', 'y'\]"):
        tap(_tagged, {"y": "top"})({"w": W}, X)
    with pytest.raises(ValueError, match="`apply` must return outputs by name, in a mapping, got list"):
        tap(lambda x: [checkpoint_name(x, "x")], "x")(X)


class _Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(4, name="shared")
        x = nn.relu(shared(shared(x)))
        return _Head(name="head")(x)[0]

    def both(self, x):
        return self(x)


class _Head(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x), {"pooled": x.mean(axis=0)}


def test_outputs_of_linen_modules():
    variables = _Net().init(jax.random.key(0), X)
    _, captured = _Net().apply(variables, X, capture_intermediates=True, mutable=["intermediates"])
    inside = captured["intermediates"]
    outputs = tap(lambda v, x: {"y": _Net().apply(v, x, method="both")}, ".*")(variables, X)
    assert list(outputs) == ["y", "shared", "shared[1]", "head/Dense_0", "head:0", "head:1/pooled", "both"]
    np.testing.assert_array_equal(outputs["shared"], inside["shared"]["__call__"][0])
    np.testing.assert_array_equal(outputs["shared[1]"], inside["shared"]["__call__"][1])
    np.testing.assert_array_equal(outputs["head:1/pooled"], inside["head"]["__call__"][0][1]["pooled"])


def test_outputs_of_linen_modules_under_scan_and_remat():
    model = zoo.scanned()
    outputs = tap(lambda params, x: {"y": model.apply(params, x)}, ".*(Dense_1|Attention_0)")(
        model.params, *model.inputs
    )
    np.testing.assert_allclose(outputs["y"], model.apply(model.params, *model.inputs), rtol=1e-6)
    assert {name: tensor.shape for name, tensor in outputs.items() if name != "y"} == {
        "MultiHeadDotProductAttention_0": (3, 2, 5, 16),
        "Dense_1": (3, 2, 5, 32),
    }


class _Mlp(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.down = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.down(self.encode(x))

    def encode(self, x):
        for block in self.blocks:
            x = nnx.relu(block(x))
        return x


@pytest.mark.parametrize("method", ["__call__", "encode"])
def test_outputs_of_nnx_modules(method):
    graph, state = nnx.split(_Mlp(nnx.Rngs(0)))
    model = nnx.merge(graph, state)
    before = dict(vars(_Mlp))
    outputs = tap(lambda s, x: {"y": getattr(nnx.merge(graph, s), method)(x)}, "(blocks/.|encode)")(state, X)
    assert dict(vars(_Mlp)) == before
    assert list(outputs) == ["y", "blocks/0", "blocks/1", "encode"]
    np.testing.assert_allclose(outputs["blocks/0"], model.blocks[0](X), rtol=1e-6)
    np.testing.assert_allclose(outputs["encode"], model.encode(X), rtol=1e-6)


def test_a_train_step_on_tapped_and_compressed_models():
    module = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(8), nn.tanh, nn.Dense(2)])
    teacher = module.init(jax.random.key(0), X)
    student, _ = quantize(
        module.init(jax.random.key(1), X),
        QuantSpec(bits=8),
        select=lambda p: jax.tree.map(lambda leaf: leaf.shape == (4, 8), p),
    )

    def apply(params, batch, *, key, train):
        return {"logits": module.apply(params, batch["x"])}

    tapped = tap(apply, {"hidden_states": r"layers_[02]"})
    loss = hidden_states(pairs=[(0, 0), (1, 1)])
    init_state, step = make_train_step(tapped, tapped, optax.adam(0.01), losses={"hidden": loss})
    state = init_state(student, key=jax.random.key(2))
    figures = []
    for _ in range(20):
        state, metrics = step(state, teacher, {"x": X})
        figures.append(float(metrics["hidden"][0]))
    assert figures[-1] < 0.9 * figures[0]
