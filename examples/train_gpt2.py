"""Trains a GPT-2 on the characters of the Brown corpus: the small decoder that `compress_gpt2.py` compresses.

450 files train, 50 are held out. The result is a Hugging Face directory with a tokenizer of characters, 3.4 MB.

    python examples/train_gpt2.py [--quick] [--steps 3000] [--out examples/gpt2_brown]

The last line is JSON: perplexity of a character on the held-out files, beside that of bigrams.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from brown_characters import DIRECTORY, characters, held_out_perplexity, write_tokenizer
from workbench import note

from jaxcompress.distillation import make_train_step, next_token_labels
from jaxcompress.models import GPT2Config, make_module, save_pretrained

LENGTH, ROWS = 128, 32
SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 256}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60 steps")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DIRECTORY)
    arguments = parser.parse_args()
    steps = 60 if arguments.quick else arguments.steps
    text = characters()
    module = make_module(GPT2Config(vocab_size=len(text.vocabulary), resid_pdrop=0.0, embd_pdrop=0.0, **SIZES))
    params = module.init(jax.random.key(arguments.seed), np.zeros((1, 8), np.int32))["params"]
    rate = optax.schedules.warmup_cosine_decay_schedule(0.0, 2e-3, steps // 20 + 1, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01))

    def apply(params: Any, batch: Any, *, key: Any, train: bool) -> Any:
        del key, train
        return module.apply({"params": params}, batch["input_ids"])

    init_state, step = make_train_step(apply, None, optimizer, losses={"next": next_token_labels(mask=None)})
    state, begun = init_state(params, key=jax.random.key(arguments.seed + 1)), time.monotonic()
    for number, batch in zip(range(1, steps + 1), batches(text.train, arguments.seed), strict=False):
        state, metrics = step(state, None, batch)
        if number % 100 == 0 or number == steps:
            total, count = map(float, metrics["next"])
            note(f"step {number}: perplexity {np.exp(total / count):.2f}, {time.monotonic() - begun:.0f} s")
    figures = {
        "steps": steps,
        "seconds": round(time.monotonic() - begun),
        "perplexity": round(held_out_perplexity(module, state.params, text), 3),
        "bigram": round(text.bigram_perplexity(), 3),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    }
    save_pretrained(arguments.out, module, state.params)
    write_tokenizer(arguments.out, text.vocabulary)
    print(json.dumps(figures))


def batches(tokens: np.ndarray, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Windows of the training text, without end."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(tokens) - LENGTH, ROWS)
        yield {"input_ids": np.stack([tokens[start : start + LENGTH] for start in starts])}


if __name__ == "__main__":
    main()
