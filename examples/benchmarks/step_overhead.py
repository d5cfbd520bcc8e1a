"""What pruning and fake quantization add to one distillation step, as a ratio within one run.

Both steps distil a BERT of MiniLM's sizes from itself, on the same batch, compiled, with AdamW; the second one prunes
2:4 and fakes 4-bit weights inside the loss, with rankings every ten steps. They run in turn, so that a machine whose
speed drifts slows both; quoted are the medians and the median of the ratios of neighbours.

    python examples/benchmarks/step_overhead.py [--quick]
"""

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from jaxcompress._src.recipe.train import model_apply
from jaxcompress.models import BertConfig, make_module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few repeats")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    quick = arguments.quick
    plain, compressing, shape = steppers(quick=quick, rows=arguments.batch, tokens=arguments.tokens)
    repeats = 10 if quick else 20
    times = np.array([[_seconds(plain), _seconds(compressing)] for _ in range(repeats)])
    ratios = times[:, 1] / times[:, 0]
    figures = {
        "plain_ms": round(1000 * float(np.median(times[:, 0])), 1),
        "compressing_ms": round(1000 * float(np.median(times[:, 1])), 1),
        "ratio": round(float(np.median(ratios)), 3),
        "ratio_of_sums": round(float(times[:, 1].sum() / times[:, 0].sum()), 3),
        "rows": shape[0],
        "tokens": shape[1],
        "repeats": repeats,
    }
    print(json.dumps(figures))


def steppers(*, quick: bool, rows: int, tokens: int) -> tuple[Any, Any, tuple[int, int]]:
    """The plain step and the one that compresses, compiled, and the shape of their batch."""
    config = BertConfig(
        vocab_size=2000 if quick else 30522,
        hidden_size=64 if quick else 384,
        num_hidden_layers=2 if quick else 6,
        num_attention_heads=4 if quick else 12,
        intermediate_size=256 if quick else 1536,
        head="sequence_classification",
        pooling="mean",
    )
    module = make_module(config)
    shape = (rows, 16 if quick else tokens)
    ids = jax.random.randint(jax.random.key(0), shape, 0, config.vocab_size)
    params = module.init(jax.random.key(1), ids)["params"]
    batch = {"input_ids": ids, "attention_mask": jnp.ones(shape, jnp.int32)}
    layouts = jc.trace.layouts(lambda p, x: module.apply({"params": p}, x), params, ids)
    kernels = jc.tree.by_path("bert/encoder/.*/kernel")
    transform = jc.chain(
        jc.pruning.gradual(
            schedule=jc.schedules.cubic(0.0, 0.5, begin=0, end=1000),
            every=10,
            select=kernels,
            layouts=layouts,
            pattern=jc.pruning.n_of_m(2, 4),
        ),
        jc.quantization.quantization_aware(
            jc.quantization.QuantSpec(bits=4, group_size=32, scale_dtype="bfloat16"), select=kernels, layouts=layouts
        ),
    )
    return _stepper(module, params, batch, jc.identity()), _stepper(module, params, batch, transform), shape


def _stepper(module: Any, params: Any, batch: dict[str, Any], transform: Any) -> Any:
    """A function that does one step and waits for it; compiled and warmed up."""
    apply = model_apply(module)
    init_state, step = jc.distillation.make_train_step(
        apply,
        apply,
        optax.adamw(1e-4),
        losses={"soft": jc.distillation.soft_targets(temperature=2.0)},
        transform=transform,
        trainable=jc.tree.exclude(jc.tree.by_path("bert/embeddings/.*")),
    )
    state = [init_state(params, key=jax.random.key(2))]

    def advance() -> None:
        state[0], metrics = step(state[0], params, batch)
        jax.block_until_ready((state[0], metrics))

    advance()
    advance()
    return advance


def _seconds(fn: Any) -> float:
    begun = time.perf_counter()
    fn()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
