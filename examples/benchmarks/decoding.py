"""Decoding with `models.generate` against a loop written by hand for one Llama, and with compressed leaves and caches.

SmolLM2-135M continues a prompt of 16 tokens by 64, one row, most probable tokens. All variants run in turn in one
process, pinned to one core; quoted are medians of tokens per second of CPU time, and ratios to the loop by hand.

    python examples/benchmarks/decoding.py [--quick] [--repeats 5]

The last line is JSON.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from smollm2 import KERNELS, load_task

import jaxcompress as jc
from jaxcompress.models import generate
from jaxcompress.quantization import QuantSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 new tokens, one repeat, plain leaves only")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    count, repeats = (8, 1) if arguments.quick else (64, arguments.repeats)
    task = load_task()
    prompt = task.held_out[None, :16]
    by_hand = jax.jit(_by_hand(task.module.config, count))
    variants: dict[str, Callable[[], Any]] = {
        "by hand": lambda: by_hand(task.params, prompt),
        "generate": lambda: generate(task.module, task.params, prompt, max_new_tokens=count).tokens,
    }
    if not arguments.quick:
        variants["generate, cache int8"] = lambda: (
            generate(task.module, task.params, prompt, max_new_tokens=count, cache_bits=8).tokens
        )
        for bits in (8, 4):
            spec = QuantSpec(bits=bits, group_size=64)
            small, _ = jc.quantization.quantize(task.params, spec, select=KERNELS)
            variants[f"generate, int{bits} leaves"] = lambda small=small: (
                generate(task.module, small, prompt, max_new_tokens=count).tokens
            )
        # The table is the head, too: a fifth of all weights, read at every step.
        whole, _ = jc.quantization.quantize(small, QuantSpec(bits=8), select=jc.tree.by_path(".*embedding"))
        variants["generate, int4 leaves, int8 table"] = lambda: (
            generate(task.module, whole, prompt, max_new_tokens=count).tokens
        )
    same = np.array_equal(variants["by hand"](), variants["generate"]())
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(repeats + 1):
        for name, run in variants.items():
            begun = time.process_time()
            jax.block_until_ready(run())
            if number:
                seconds[name].append(time.process_time() - begun)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    figures = {
        "same_tokens": bool(same),
        "tokens_per_cpu_second": {name: round(count / each, 2) for name, each in medians.items()},
        "of_by_hand": {
            name: round(statistics.median(a / b for a, b in zip(seconds["by hand"], each, strict=True)), 3)
            for name, each in seconds.items()
        },
    }
    print(json.dumps(figures))


def _by_hand(config: Any, count: int) -> Callable[[Any, Any], jax.Array]:
    """The plainest loop: keys and values in arrays, no padding, no options."""
    heads, keys, size = config.num_attention_heads[0], config.num_key_value_heads[0], config.head_size
    layers, theta = config.num_hidden_layers, config.rope_theta ** -(np.arange(0, size, 2) / size)

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + config.rms_norm_eps) * weight

    def turned(x: jax.Array, places: jax.Array) -> jax.Array:
        angles = places[:, None, None] * theta.astype(np.float32)
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate(
            [a * jnp.cos(angles) - b * jnp.sin(angles), b * jnp.cos(angles) + a * jnp.sin(angles)], axis=-1
        )

    def read(params: Any, ids: jax.Array, start: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        model, room = params["model"], cache[0][0].shape[0]
        x = model["embed_tokens"]["embedding"][ids]
        places = start + jnp.arange(len(ids))
        seen = jnp.arange(room)[None] <= places[:, None]
        new = []
        for layer in range(layers):
            p = model["layers"][str(layer)]
            y, a = norm(x, p["input_layernorm"]["weight"]), p["self_attn"]
            q, k, v = ((y @ a[f"{name}_proj"]["kernel"]).reshape(len(ids), -1, size) for name in ("q", "k", "v"))
            q, k = turned(q, places), turned(k, places)
            old = zip(cache[layer], (k, v), strict=True)
            k, v = (jax.lax.dynamic_update_slice_in_dim(whole, part, start, 0) for whole, part in old)
            new.append((k, v))
            q = q.reshape(len(ids), keys, heads // keys, size)
            scores = jnp.einsum("lkgd,skd->kgls", q, k) * size**-0.5
            weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -1e30))
            x = x + jnp.einsum("kgls,skd->lkgd", weights, v).reshape(len(ids), -1) @ a["o_proj"]["kernel"]
            y, f = norm(x, p["post_attention_layernorm"]["weight"]), p["mlp"]
            inner = jax.nn.silu(y @ f["gate_proj"]["kernel"]) * (y @ f["up_proj"]["kernel"])
            x = x + inner @ f["down_proj"]["kernel"]
        return norm(x[-1], model["norm"]["weight"]) @ model["embed_tokens"]["embedding"].T, new

    def run(params: Any, prompt: jax.Array) -> jax.Array:
        room = prompt.shape[1] + count
        empty = [(jnp.zeros((room, keys, size)), jnp.zeros((room, keys, size))) for _ in range(layers)]
        logits, cache = read(params, prompt[0], jnp.int32(0), empty)

        def step(number: jax.Array, state: Any) -> Any:
            logits, cache, tokens = state
            token = logits.argmax().astype(jnp.int32)
            logits, cache = read(params, token[None], prompt.shape[1] + number, cache)
            return logits, cache, tokens.at[number].set(token)

        return jax.lax.fori_loop(0, count, step, (logits, cache, jnp.zeros(count, jnp.int32)))[2][None]

    return run


if __name__ == "__main__":
    main()
