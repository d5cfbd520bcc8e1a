"""MiniLM with a classifier, fine-tuned once and cached: what the demo and the examples start from."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import jax
from flax import linen as nn

from jaxcompress._src.models.hf.read import from_pretrained
from jaxcompress._src.models.hf.write import save_pretrained
from jaxcompress._src.recipe.assets import MINILM, cache_directory
from jaxcompress._src.recipe.progress import Progress
from jaxcompress._src.recipe.steps import Training
from jaxcompress._src.recipe.tokens import Tokens
from jaxcompress._src.recipe.train import train
from jaxcompress._src.tree.selectors import by_path, exclude
from jaxcompress._src.types import Params


def fine_tuned_minilm(
    minilm: Path,
    tokens: Tokens,
    training: Training,
    *,
    note: Callable[[str], None],
    progress: Progress | None = None,
) -> tuple[nn.Module, Params]:
    """MiniLM with a classifier over the mean of its vectors; from the cache if it was made by the same settings.

    Args:
        minilm: directory of the asset `MINILM`.
        tokens: the training rows.
        training: how to fine-tune; the embeddings stay as they are.
        note: told in one line where a cached model lies.
        progress: where to show loss and time left.
    """
    settings = json.dumps([dataclasses.asdict(training), len(tokens), MINILM.version], sort_keys=True)
    directory = cache_directory() / f"fine-tuned-{hashlib.sha256(settings.encode()).hexdigest()[:16]}"
    if (directory / "config.json").is_file():
        note(f"Using the fine-tuned model in {directory}.")
        return from_pretrained(directory)
    module, params = from_pretrained(
        minilm, head="sequence_classification", num_labels=2, pooling="mean", key=jax.random.key(training.seed)
    )
    params, _ = train(
        module,
        params,
        tokens,
        training,
        trainable=exclude(by_path("bert/embeddings/.*")),
        progress=progress,
        name="Fine-tuning MiniLM",
    )
    save_pretrained(directory, module, params)
    return module, params
