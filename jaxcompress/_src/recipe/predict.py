"""A model's outputs for every row, and how far two masked language models are apart."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxcompress._src.execution.execute import execute
from jaxcompress._src.models.families import max_tokens
from jaxcompress._src.models.hf.companions import SentencePooling
from jaxcompress._src.recipe.heads import evaluated, with_sentence_vector
from jaxcompress._src.recipe.progress import Progress, Silent
from jaxcompress._src.recipe.tokens import Tokens, evaluation_batches, row_widths
from jaxcompress._src.types import Params

_NARROW = 64  # rows up to here fill a batch; wider ones come fewer at a time, so that a batch keeps its memory


def predictor(
    module: nn.Module, *, pooling: SentencePooling = "mean"
) -> Callable[[Params, Any, Any], dict[str, jax.Array]]:
    """A compiled `(params, input_ids, attention_mask) -> outputs by name`; leaves may be compressed.

    Args:
        module: a model of `jaxcompress.models`.
        pooling: of the sentence vectors of a plain encoder.

    Returns:
        The function. A classifier gives `logits` and `pooler_output`; a plain encoder `sentence_vector`, and
        `pooler_output` if it has a pooler; a masked language model `token`, the most probable one at each position
        (int32, -1 at padding).
    """

    def apply(params: Params, input_ids: Any, attention_mask: Any) -> dict[str, jax.Array]:
        outputs: Any = module.apply({"params": params}, input_ids, attention_mask)
        return evaluated(module, with_sentence_vector(module, outputs, attention_mask, pooling), attention_mask)

    return jax.jit(execute(apply))


def predict(
    module: nn.Module,
    params: Params,
    tokens: Tokens,
    *,
    batch_size: int = 50,
    widths: tuple[int, ...] | None = None,
    pooling: SentencePooling = "mean",
    progress: Progress | None = None,
    name: str = "Predicting",
) -> dict[str, np.ndarray]:
    """The outputs of every row, in the order of the rows.

    Args:
        module: a model of `jaxcompress.models`.
        params: may hold compressed leaves.
        tokens: the rows.
        batch_size: rows in a batch of rows of up to 64 tokens; wider batches hold fewer.
        widths: rows are padded to the narrowest of these that holds them, and cut to the last one. By default
            `row_widths`, which cuts nothing.
        pooling: of the sentence vectors of a plain encoder.
        progress: where to show the time left.
        name: of the task shown.

    Returns:
        The outputs of `predictor`, float32 (rows, ...); `token` of a masked language model is int32 (rows, the last
        width).
    """
    run = predictor(module, pooling=pooling)
    widths = _widths(module, tokens) if widths is None else widths
    outputs: dict[str, np.ndarray] = {}
    for batch in _shown(_batches(tokens, batch_size, widths), progress, name):
        real = batch["row"] >= 0
        for output, values in run(params, batch["input_ids"], batch["attention_mask"]).items():
            array = np.asarray(values)
            if output == "token":
                missing = widths[-1] - array.shape[1]
                array = np.pad(array, ((0, 0), (0, missing)), constant_values=-1)
            else:
                array = array.astype(np.float32)
            whole = outputs.setdefault(output, np.zeros((len(tokens), *array.shape[1:]), array.dtype))
            whole[batch["row"][real]] = array[real]
    return outputs


def token_divergence(
    module: nn.Module,
    params: Params,
    reference_module: nn.Module,
    reference: Params,
    tokens: Tokens,
    *,
    batch_size: int = 50,
    progress: Progress | None = None,
    name: str = "Comparing",
) -> tuple[np.ndarray, np.ndarray]:
    """How far the distributions of two masked language models are apart on each row, as both read it.

    Both run side by side, batch by batch: their distributions over the vocabulary are never kept.

    Args:
        module: of the model.
        params: of the model; may hold compressed leaves.
        reference_module: of the other one.
        reference: its parameters.
        tokens: the rows.
        batch_size: as in `predict`.
        progress: where to show the time left.
        name: of the task shown.

    Returns:
        For each row the mean over its tokens of KL(reference || model) in nats, and the share of tokens for which both
        find the same one most probable; float64, (rows,).
    """

    @jax.jit
    @execute
    def run(params: Params, reference: Params, input_ids: Any, attention_mask: Any) -> tuple[jax.Array, jax.Array]:
        def log_probabilities(module: nn.Module, params: Params) -> jax.Array:
            outputs: Any = module.apply({"params": params}, input_ids, attention_mask)
            return jax.nn.log_softmax(outputs["logits"].astype(jnp.float32))

        q, p = log_probabilities(module, params), log_probabilities(reference_module, reference)
        mask = attention_mask > 0
        count = mask.sum(-1)
        divergence = jnp.where(mask, (jnp.exp(p) * (p - q)).sum(-1), 0.0).sum(-1) / count
        return divergence, (mask & (p.argmax(-1) == q.argmax(-1))).sum(-1) / count

    figures = np.zeros((2, len(tokens)))
    for batch in _shown(_batches(tokens, batch_size, _widths(module, tokens)), progress, name):
        real = batch["row"] >= 0
        results = run(params, reference, batch["input_ids"], jnp.asarray(batch["attention_mask"]))
        figures[:, batch["row"][real]] = np.asarray(results)[:, real]
    divergence, agreement = figures
    return np.maximum(divergence, 0.0), agreement


def _widths(module: nn.Module, tokens: Tokens) -> tuple[int, ...]:
    return row_widths(tokens, most=max_tokens(module))


def _batches(tokens: Tokens, batch_size: int, widths: tuple[int, ...]) -> list[dict[str, Any]]:
    most = batch_size * _NARROW
    return list(evaluation_batches(tokens, batch_size=batch_size, widths=widths, most_tokens=most))


def _shown(batches: list[dict[str, Any]], progress: Progress | None, name: str) -> Iterator[dict[str, Any]]:
    with (progress or Silent()).task(name, len(batches)) as task:
        for batch in batches:
            yield batch
            task.advance()
