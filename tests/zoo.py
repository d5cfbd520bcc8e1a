"""Small models, one for each way in which a model uses its leaves: what `trace` and `execution` are tested on."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Model:
    """A pure model, its parameters and inputs, and what its layouts must be: path -> (kind, stack, input, output)."""

    apply: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    expected: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def _linen(module: nn.Module, *inputs: Any, expected: dict[str, Any], method: Any = None) -> Model:
    params = jax.jit(functools.partial(module.init, method=method))(jax.random.key(0), *inputs)["params"]
    return Model(lambda p, *x: module.apply({"params": p}, *x, method=method), params, inputs, expected)


def _normal(*shape: int, seed: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


class _TiedEmbedding(nn.Module):
    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        embed = nn.Embed(24, 16)
        return embed.attend(nn.Dense(16)(embed(ids)))


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        x = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=16)(x)
        return x + nn.Dense(16)(nn.gelu(nn.Dense(32)(y))), None


def dense() -> Model:
    return _linen(nn.Dense(24), _normal(4, 16), expected={"kernel": ("matmul", (), (0,), (1,))})


def few_tokens() -> Model:
    """One row against a kernel that is large enough for the block-by-block rule."""
    return _linen(nn.Dense(768), _normal(1, 512), expected={"kernel": ("matmul", (), (0,), (1,))})


def dense_general() -> Model:
    return _linen(
        nn.DenseGeneral((3, 8), axis=(-2, -1)),
        _normal(5, 4, 16),
        expected={"kernel": ("matmul", (), (0, 1), (2, 3))},
    )


def attention() -> Model:
    return _linen(
        nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=16),
        _normal(3, 5, 16),
        expected={
            "query/kernel": ("matmul", (), (0,), (1, 2)),
            "value/kernel": ("matmul", (), (0,), (1, 2)),
            "out/kernel": ("matmul", (), (0, 1), (2,)),
        },
    )


def conv() -> Model:
    return _linen(nn.Conv(8, (3, 3)), _normal(2, 6, 6, 16), expected={"kernel": ("conv", (), (0, 1, 2), (3,))})


def embed() -> Model:
    return _linen(
        nn.Embed(24, 16), jnp.array([[1, 2, 23], [0, 5, 5]]), expected={"embedding": ("lookup", (), (1,), (0,))}
    )


def tied_embed() -> Model:
    ids = jnp.array([[1, 2, 23], [0, 5, 5]])
    return _linen(_TiedEmbedding(), ids, expected={"Embed_0/embedding": ("tied", (), (1,), (0,))})


def scanned() -> Model:
    """Three layers of attention and feed-forward under `nn.scan` of `nn.remat`."""
    stack = nn.scan(nn.remat(_Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    x = _normal(2, 5, 16)
    params = jax.jit(stack.init)(jax.random.key(0), x, None)["params"]
    attended = "MultiHeadDotProductAttention_0"
    return Model(
        lambda p, y: stack.apply({"params": p}, y, None)[0],
        params,
        (x,),
        {
            "Dense_0/kernel": ("matmul", (0,), (1,), (2,)),
            f"{attended}/query/kernel": ("matmul", (0,), (1,), (2, 3)),
            f"{attended}/out/kernel": ("matmul", (0,), (1, 2), (3,)),
            "LayerNorm_0/scale": ("other", (), (), (0, 1)),
        },
    )


def conv1d_of_hf_gpt2() -> Model:
    """What HF Flax GPT-2 does: a kernel stored (out, in) and transposed at every call."""

    def apply(params: Any, x: jax.Array) -> jax.Array:
        kernel = jnp.asarray(params["c_attn"]["kernel"].transpose(), jnp.float32)
        return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))

    params = {"c_attn": {"kernel": _normal(24, 16, seed=2)}}
    return Model(apply, params, (_normal(3, 16),), {"c_attn/kernel": ("matmul", (), (1,), (0,))})


def nnx_mlp() -> Model:
    class Mlp(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.up = nnx.Linear(16, 32, rngs=rngs)
            self.down = nnx.Linear(32, 8, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.down(nnx.relu(self.up(x)))

    graph, state = nnx.split(Mlp(nnx.Rngs(0)))
    return Model(
        lambda s, x: nnx.merge(graph, s)(x),
        state,
        (_normal(4, 16),),
        {"up/kernel": ("matmul", (), (0,), (1,)), "down/kernel": ("matmul", (), (0,), (1,))},
    )


def equinox_mlp() -> Model:
    mlp = eqx.nn.MLP(16, 8, 32, 1, key=jax.random.key(0))
    return Model(
        lambda m, x: jax.vmap(m)(x),
        mlp,
        (_normal(4, 16),),
        {"layers/0/weight": ("matmul", (), (1,), (0,)), "layers/1/weight": ("matmul", (), (1,), (0,))},
    )


def einsum_experts() -> Model:
    """A raw function: batched matmul over experts, and a leaf on the left-hand side."""

    def apply(params: Any, x: jax.Array) -> jax.Array:
        routed = jnp.einsum("td,edf->etf", x, params["experts"])
        return jnp.einsum("fo,etf->eto", params["down"], routed * params["gain"][:, None, None])

    params = {"experts": _normal(3, 16, 8, seed=3), "down": _normal(8, 24, seed=4), "gain": _normal(3, seed=5)}
    return Model(
        apply,
        params,
        (_normal(5, 16),),
        {
            "experts": ("matmul", (), (1,), (0, 2)),
            "down": ("matmul", (), (0,), (1,)),
            "gain": ("other", (), (), (0,)),
        },
    )


def batched_experts() -> Model:
    """Experts along a batch axis of the matmul."""
    params = {"experts": _normal(3, 16, 8, seed=3)}
    return Model(
        lambda p, x: jnp.einsum("etd,edf->etf", x, p["experts"]),
        params,
        (_normal(3, 5, 16),),
        {"experts": ("matmul", (0,), (1,), (2,))},
    )


def control_flow() -> Model:
    """Weights inside `cond`, `while` and a function with its own derivative."""

    @jax.custom_vjp
    def scaled(x: jax.Array) -> jax.Array:
        return 2.0 * x

    scaled.defvjp(lambda x: (2.0 * x, None), lambda _, g: (3.0 * g,))

    def apply(params: Any, x: jax.Array) -> jax.Array:
        y = jax.lax.cond(x.sum() > 0, lambda w, z: z @ w, lambda w, z: z @ (2 * w), params["a"], x)
        y = jax.lax.fori_loop(0, 2, lambda _, z: jnp.tanh(z @ params["b"]), y)
        return scaled(y)

    params = {"a": _normal(16, 16, seed=6), "b": _normal(16, 16, seed=7)}
    expected = {"a": ("matmul", (), (0,), (1,)), "b": ("matmul", (), (0,), (1,))}
    return Model(apply, params, (_normal(4, 16),), expected)


MODELS: dict[str, Callable[[], Model]] = {
    fn.__name__: fn
    for fn in (
        dense,
        few_tokens,
        dense_general,
        attention,
        conv,
        embed,
        tied_embed,
        scanned,
        conv1d_of_hf_gpt2,
        nnx_mlp,
        equinox_mlp,
        einsum_experts,
        batched_experts,
        control_flow,
    )
}
