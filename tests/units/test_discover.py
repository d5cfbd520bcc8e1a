"""Units of models that nobody described: those found equal hand-written ones, and masking them equals removing them."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from owned_units import assert_masked_equals_shrunk, assert_same, draw, owned, slices

from jaxcompress._src.units.shrink import mask_units
from jaxcompress.models import BertConfig, GPT2Config, LlamaConfig, make_module, unit_groups
from jaxcompress.structured import UnitGroup, discover_units, shrink

# Families: their units are written by hand, but for the names and the order of the groups.

SIZES = {"vocab_size": 30, "hidden_size": 12, "num_hidden_layers": 2, "intermediate_size": (7, 11), "head_size": 6}
CONFIGS = {
    "bert": BertConfig(**SIZES, num_attention_heads=(3, 2), head="masked_lm"),
    "distilbert": BertConfig(**SIZES, num_attention_heads=(3, 2), head="masked_lm", model_type="distilbert"),
    "gpt2": GPT2Config(**SIZES, num_attention_heads=(3, 2), head="causal_lm"),
    "llama": LlamaConfig(
        **SIZES, num_attention_heads=(6, 4), num_key_value_heads=(3, 2), head="causal_lm", qkv_bias=True, mlp_bias=True
    ),
    "qwen3": LlamaConfig(
        **SIZES, num_attention_heads=(6, 4), num_key_value_heads=(3, 2), head="causal_lm", qk_norm=True,
        tie_word_embeddings=True, model_type="qwen3",
    ),
}  # fmt: skip
IDS = jnp.zeros((2, 5), jnp.int32)


def _logits(module):
    return lambda params, *inputs: module.apply({"params": params}, *inputs)["logits"]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_units_of_families_are_those_written_by_hand(name):
    module, kinds = make_module(CONFIGS[name]), ["heads", "columns", "hidden"]
    params = jax.eval_shape(module.init, jax.random.key(0), IDS)["params"]
    groups = discover_units(_logits(module), params, IDS, IDS, kinds=kinds)
    assert_same(groups, unit_groups(module.config, kinds=kinds), params)
    assert [(group.kind, group.count) for group in groups] == [
        ("hidden", 12), ("heads", 3), ("columns", 7), ("heads", 2), ("columns", 11),
    ]  # fmt: skip


def test_the_pooler_of_bert_need_not_have_the_width_of_the_stream(config, params, module):
    """By hand it has, for a BERT has one hidden size; in the program nothing says so."""
    kinds = ("heads", "columns", "hidden")
    *groups, pooler = discover_units(_logits(module), params, IDS, kinds=kinds)
    by_hand = unit_groups(config, kinds=kinds)
    assert_same([each for each in groups if each.kind != "hidden"], by_hand[:-1], params)
    assert pooler.name == "bert/pooler/dense/kernel"
    stream = next(each for each in groups if each.kind == "hidden")
    assert owned(stream, params) | owned(pooler, params) == owned(by_hand[-1], params)


# A ViT of Flax modules: a patch convolution, learned tokens and positions, fused and separate queries, keys and values.


class ViTBlock(nn.Module):
    heads: int
    width: int
    fused: bool

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        if self.fused:
            qkv = nn.Dense(3 * self.heads * 4, name="qkv")(y).reshape(*x.shape[:2], 3, self.heads, 4)
            context = nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0))
            x = x + nn.Dense(x.shape[-1], name="out")(context.reshape(*x.shape[:2], self.heads * 4))
        else:
            attention = nn.MultiHeadDotProductAttention(self.heads, qkv_features=4 * self.heads, name="attention")
            x = x + attention(y, y)
        inner = nn.gelu(nn.Dense(self.width, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1], name="down")(inner)


class ViT(nn.Module):
    heads: tuple[int, ...] = (3, 2)
    widths: tuple[int, ...] = (7, 9)
    hidden: int = 10

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.hidden, (4, 4), strides=(4, 4), padding="VALID", name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.hidden)
        token = self.param("token", nn.initializers.zeros, (1, 1, self.hidden))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.hidden)), x], axis=1)
        x = x + self.param("positions", nn.initializers.zeros, (1, x.shape[1], self.hidden))
        for number, (heads, width) in enumerate(zip(self.heads, self.widths, strict=True)):
            x = ViTBlock(heads, width, fused=number == 0, name=f"block{number}")(x)
        return nn.Dense(5, name="head")(nn.LayerNorm()(x)[:, 0])


IMAGES = jnp.asarray(np.random.default_rng(3).normal(size=(2, 8, 12, 3)), jnp.float32)


@pytest.fixture(scope="module")
def vit():
    return draw(jax.eval_shape(ViT().init, jax.random.key(0), IMAGES)["params"])


def _run(module):
    return jax.jit(lambda params, x: module.apply({"params": params}, x))


RUN_VIT = _run(ViT())


def _smaller_vit(small):
    heads = (small["block0"]["out"]["kernel"].shape[0] // 4, small["block1"]["attention"]["out"]["kernel"].shape[0])
    widths = tuple(small[f"block{number}"]["up"]["bias"].shape[0] for number in range(2))
    return _run(ViT(heads, widths, small["token"].shape[-1]))


def test_heads_and_columns_of_a_vit(vit):
    groups = discover_units(RUN_VIT, vit, IMAGES)
    expected = {
        "block0/qkv/kernel": ("heads", 3),
        "block0/up/kernel": ("columns", 7),
        "block1/attention/query/kernel": ("heads", 2),
        "block1/up/kernel": ("columns", 9),
    }
    assert {group.name: (group.kind, group.count) for group in groups} == expected
    fused = slices(
        ("block0/out/kernel", 0, {"width": 4, "gated": True}),
        ("block0/qkv/bias", 0, {"width": 4, "repeat": 3}),
        ("block0/qkv/kernel", 1, {"width": 4, "repeat": 3}),
    )
    assert groups[0] == UnitGroup(name="block0/qkv/kernel", kind="heads", count=3, slices=fused)
    small = assert_masked_equals_shrunk(RUN_VIT, _smaller_vit, vit, groups, IMAGES)
    assert small["block0"]["qkv"]["kernel"].shape == (10, 3 * 2 * 4)
    assert small["block1"]["attention"]["out"]["kernel"].shape == (1, 4, 10)


def test_the_hidden_width_of_a_vit(vit):
    """Shrunk, it is the smaller module on slices made by hand: every axis of length 10."""
    (stream,) = discover_units(RUN_VIT, vit, IMAGES, kinds=["hidden"])
    assert (stream.name, stream.count) == ("patches/kernel", 10)
    left = np.array([0, 2, 3, 5, 6, 9])

    def by_hand(leaf):
        for axis, size in enumerate(leaf.shape):
            leaf = leaf.take(left, axis=axis) if size == 10 else leaf
        return leaf

    small = shrink(vit, [stream], {stream.name: np.isin(np.arange(10), left)})
    expected = jax.tree.map(by_hand, vit)
    jax.tree.map(np.testing.assert_array_equal, small, expected)
    assert jax.eval_shape(_smaller_vit(small), small, IMAGES).shape == (2, 5)
    # Gates are on all that writes: without its writers the stream is zero.
    masked = mask_units(vit, [stream], {stream.name: np.zeros(10, bool)})
    np.testing.assert_array_equal(RUN_VIT(masked, IMAGES), np.tile(masked["head"]["bias"], (2, 1)))


# A ResNet with BatchNorm: shortcuts with and without kernels, depthwise and grouped convolutions, squeeze and excite,
# and what lies side by side.

WIDTHS = {
    "stem": 6, "first": 5, "second": 6, "wide": 7, "depthwise": 7, "narrow": 9, "shortcut": 9,
    "before": 8, "in_groups": 4, "squeeze": 3, "excite": 4, "last": 5,
}  # fmt: skip


class Net(nn.Module):
    widths: Any
    groups: int = 2

    def conv(self, name, x, size=3, *, strides=1, groups=1):
        conv = nn.Conv(self.widths[name], (size, size), strides, feature_group_count=groups, name=name)
        return nn.BatchNorm(use_running_average=True, name=f"{name}_norm")(conv(x))

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(self.conv("stem", x)), (2, 2), (2, 2))
        x = nn.relu(x + self.conv("second", nn.relu(self.conv("first", x))))
        y = nn.relu(self.conv("wide", x, 1))
        y = nn.relu(self.conv("depthwise", y, groups=y.shape[-1]))
        y = self.conv("narrow", y, 1, strides=2)
        x = nn.relu(y + self.conv("shortcut", x, 1, strides=2))
        y = nn.relu(self.conv("in_groups", nn.relu(self.conv("before", x)), groups=self.groups))
        squeezed = nn.relu(nn.Dense(self.widths["squeeze"], name="squeeze")(y.mean((1, 2))))
        y = y * nn.sigmoid(nn.Dense(self.widths["excite"], name="excite")(squeezed))[:, None, None]
        x = self.conv("last", jnp.concatenate([x, y], axis=-1), 1)
        return nn.Dense(4, name="head")(x.mean((1, 2))) + nn.Dense(4, name="flat")(x.reshape(len(x), -1))


def _run_net(module):
    return jax.jit(lambda variables, x: module.apply(variables, x))


def _smaller_net(small):
    kernels = {name: leaf["kernel"].shape for name, leaf in small["params"].items() if "kernel" in leaf}
    widths = {name: shape[-1] for name, shape in kernels.items()}
    return _run_net(Net(widths, kernels["before"][-1] // kernels["in_groups"][2]))


def test_channels_of_a_resnet():
    """A residual stream under BatchNorm is a group like any other: nothing sums over its channels."""
    run = _run_net(Net(WIDTHS))
    params = draw(jax.eval_shape(Net(WIDTHS).init, jax.random.key(0), IMAGES))
    groups = discover_units(run, params, IMAGES)
    assert {group.name: (group.kind, group.count) for group in groups} == {
        "params/stem/kernel": ("channels", 6),
        "params/first/kernel": ("channels", 5),
        "params/wide/kernel": ("channels", 7),
        "params/narrow/kernel": ("channels", 9),
        "params/before/kernel": ("channels", 2),
        "params/squeeze/kernel": ("columns", 3),
        "params/last/kernel": ("channels", 5),
    }
    before = next(group for group in groups if group.name == "params/before/kernel")
    parts = {(part.path, part.axis): part for part in before.slices}
    beside = parts["params/last/kernel", 2]
    assert (beside.offset, beside.width, beside.gated) == (9, 2, True)
    assert parts["params/before/kernel", 3].width == 4
    assert {part.path for part in before.gated} == {"params/last/kernel", "params/squeeze/kernel"}
    last = {(part.path, part.axis): part for part in groups[-1].slices}
    assert last["params/flat/kernel", 0].repeat == 2 * 3
    small = assert_masked_equals_shrunk(run, _smaller_net, params, groups, IMAGES)
    assert small["params"]["flat"]["kernel"].shape == (2 * 3 * 3, 4)
    assert small["batch_stats"]["stem_norm"]["var"].shape == (4,)
    assert small["params"]["depthwise"]["kernel"].shape == (3, 3, 1, 4)


# A Llama of plain functions that read their sizes from the arrays, but for the size of a head.

HEAD = 4


def _rms(x, scale):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def _rotary(x):
    angles = jnp.arange(x.shape[1])[:, None] * 10000.0 ** (-jnp.arange(0, HEAD, 2) / HEAD)[None]
    cos, sin = (jnp.concatenate([each, each], -1)[None, :, None] for each in (jnp.cos(angles), jnp.sin(angles)))
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


def llama(params, ids, *, gqa="repeat"):
    x = params["embed"][ids]
    for layer in params["layers"]:
        y = _rms(x, layer["norm"])
        q, k, v = (jnp.dot(y, layer[name]).reshape(*ids.shape, -1, HEAD) for name in ("q", "k", "v"))
        q, k = _rotary(_rms(q, layer["q_norm"])), _rotary(k)
        group = q.shape[2] // k.shape[2]
        causal = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool))
        if gqa == "repeat":
            k, v = (jnp.repeat(each, group, axis=2) for each in (k, v))
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / HEAD**0.5
            weights = jax.nn.softmax(jnp.where(causal[None, None], scores, -1e9))
            context = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        elif gqa == "grouped":
            q = q.reshape(*ids.shape, -1, group, HEAD)
            scores = jnp.einsum("bqhgd,bkhd->bhgqk", q, k) / HEAD**0.5
            weights = jax.nn.softmax(jnp.where(causal[None, None, None], scores, -1e9))
            context = jnp.einsum("bhgqk,bkhd->bqhgd", weights, v)
        else:
            context = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + context.reshape(*ids.shape, -1) @ layer["o"]
        y = _rms(x, layer["norm2"])
        x = x + (jax.nn.silu(y @ layer["gate"]) * (y @ layer["up"])) @ layer["down"]
    x = _rms(x, params["norm"])
    return x @ (params["head"] if "head" in params else params["embed"].T)


def _llama_params(*, tied, kv=3, group=2, hidden=10, inner=7, vocabulary=20):
    def layer():
        heads = {"q": (hidden, kv * group * HEAD), "k": (hidden, kv * HEAD), "v": (hidden, kv * HEAD)}
        ffn = {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
        norms = {"norm": (hidden,), "norm2": (hidden,), "q_norm": (HEAD,)}
        return {**heads, **ffn, **norms, "o": (kv * group * HEAD, hidden)}

    shapes = {"embed": (vocabulary, hidden), "norm": (hidden,), "layers": [layer(), layer()]}
    shapes |= {} if tied else {"head": (hidden, vocabulary)}
    is_shape = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    return draw(jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=is_shape))


def _llama_units(tied):
    """By hand."""
    groups, stream = [], [("embed", 1, {"gated": True}), ("norm", 0, {"gated": True})]
    stream += [] if tied else [("head", 0, {})]
    for layer in ("layers/0", "layers/1"):
        heads = [(f"{layer}/{name}", 1, {"width": 2 * HEAD if name == "q" else HEAD}) for name in ("q", "k", "v")]
        heads.append((f"{layer}/o", 0, {"width": 2 * HEAD, "gated": True}))
        columns = [(f"{layer}/gate", 1, {}), (f"{layer}/up", 1, {}), (f"{layer}/down", 0, {"gated": True})]
        stream += [(f"{layer}/{name}", 0, {}) for name in ("q", "k", "v", "gate", "up")]
        stream += [(f"{layer}/{name}", 1, {"gated": True}) for name in ("o", "down")]
        stream += [(f"{layer}/{name}", 0, {"gated": True}) for name in ("norm", "norm2")]
        groups.append(UnitGroup(name=f"{layer}/q", kind="heads", count=3, slices=slices(*heads)))
        groups.append(UnitGroup(name=f"{layer}/gate", kind="columns", count=7, slices=slices(*columns)))
    return [*groups, UnitGroup(name="embed", kind="hidden", count=10, slices=slices(*stream))]


TOKENS = np.array([[3, 9, 4, 7, 1], [8, 2, 6, 0, 0]])


@pytest.mark.parametrize(("gqa", "tied"), [("repeat", True), ("grouped", False), ("jax.nn", False)])
def test_units_of_a_llama(gqa, tied):
    """A key and value head goes with all query heads of its group."""
    params, apply = _llama_params(tied=tied), jax.jit(functools.partial(llama, gqa=gqa))
    groups = discover_units(apply, params, TOKENS, kinds=["heads", "columns", "hidden"])
    assert_same(groups, _llama_units(tied), params)
    plain = [group for group in groups if group.kind != "hidden"]
    assert [(group.name, group.kind) for group in plain] == [
        (group.name, group.kind) for group in _llama_units(tied)[:-1]
    ]
    if gqa == "grouped":
        small = assert_masked_equals_shrunk(apply, lambda small: apply, params, plain, TOKENS)
        assert small["layers"][0]["q"].shape == (10, 2 * 2 * HEAD)
    stream = next(group for group in groups if group.kind == "hidden")
    left = np.array([0, 2, 3, 5, 6, 9])
    small, by_hand = shrink(params, groups, {stream.name: np.isin(np.arange(10), left)}), jax.tree.map(np.array, params)
    for (path, axis), _ in owned(_llama_units(tied)[-1], params):
        *parents, name = path.split("/")
        tree = by_hand
        for parent in parents:
            tree = tree[int(parent) if parent.isdigit() else parent]
        tree[name] = tree[name].take(left, axis=axis)
    jax.tree.map(np.testing.assert_array_equal, small, by_hand)
    assert jax.eval_shape(apply, small, TOKENS).shape == (2, 5, 20)


# NNX, stacked layers.


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(5, 7, rngs=rngs)
        self.second = nnx.Linear(7, 9, rngs=rngs)
        self.third = nnx.Linear(9, 3, rngs=rngs)

    def __call__(self, x):
        return self.third(nnx.gelu(self.second(nnx.tanh(self.first(x)))))


def test_units_of_an_nnx_mlp():
    graph, state = nnx.split(Mlp(nnx.Rngs(0)))
    state = draw(state)

    @jax.jit
    def apply(state, x):
        return nnx.merge(graph, state)(x)

    x = jnp.asarray(np.random.default_rng(1).normal(size=(6, 5)), jnp.float32)
    groups = discover_units(apply, state, x)
    assert [(group.name, group.kind, group.count) for group in groups] == [
        ("first/kernel", "columns", 7), ("second/kernel", "columns", 9),
    ]  # fmt: skip
    assert_masked_equals_shrunk(apply, lambda small: apply, state, groups, x)
