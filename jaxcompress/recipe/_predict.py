"""A model's outputs for every row."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from jaxcompress.execution import execute
from jaxcompress.recipe._progress import Progress, Silent
from jaxcompress.recipe._text import Tokens, evaluation_batches
from jaxcompress.types import Params

_OUTPUTS = ("logits", "pooler_output")


def predictor(module: nn.Module) -> Callable[[Params, Any, Any], dict[str, jax.Array]]:
    """A compiled `(params, input_ids, attention_mask) -> {"logits", "pooler_output"}`; leaves may be compressed."""

    def apply(params: Params, input_ids: Any, attention_mask: Any) -> dict[str, jax.Array]:
        outputs: Any = module.apply({"params": params}, input_ids, attention_mask)
        return {name: outputs[name] for name in _OUTPUTS}

    return jax.jit(execute(apply))


def predict(
    module: nn.Module,
    params: Params,
    tokens: Tokens,
    *,
    batch_size: int = 50,
    widths: tuple[int, ...] = (24, 40, 64),
    progress: Progress | None = None,
    name: str = "Predicting",
) -> dict[str, np.ndarray]:
    """Logits and pooled vectors of every row, in the order of the rows.

    Args:
        module: a sequence classifier.
        params: may hold compressed leaves.
        tokens: the rows.
        batch_size: rows in a batch.
        widths: rows are padded to the narrowest of these that holds them.
        progress: where to show the time left.
        name: of the task shown.

    Returns:
        `logits`, float32 (rows, labels), and `pooler_output`, float32 (rows, features).
    """
    run = predictor(module)
    batches = list(evaluation_batches(tokens, batch_size=batch_size, widths=widths))
    outputs: dict[str, np.ndarray] = {}
    with (progress or Silent()).task(name, len(batches)) as task:
        for batch in batches:
            kept = batch["row"] >= 0
            for output, values in run(params, batch["input_ids"], batch["attention_mask"]).items():
                found = np.asarray(values, np.float32)
                whole = outputs.setdefault(output, np.zeros((len(tokens), *found.shape[1:]), np.float32))
                whole[batch["row"][kept]] = found[kept]
            task.advance()
    return outputs
