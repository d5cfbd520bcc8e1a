"""Figures of causal language models."""

from collections.abc import Callable
from typing import Any

import numpy as np
from flax import linen as nn

from jaxcompress._src.cli.figures import compare_tokens
from jaxcompress._src.cli.screen import Screen
from jaxcompress._src.models.families import config_of, max_tokens
from jaxcompress._src.recipe.directories import LoadedModel
from jaxcompress._src.recipe.predict import token_divergence
from jaxcompress._src.recipe.text import Texts
from jaxcompress._src.recipe.tokens import Tokens, has_tokenizer, in_windows, whole_rows
from jaxcompress._src.report.perplexity import perplexity
from jaxcompress._src.types import Params

_WINDOW = 512


def language_model_figures(
    screen: Screen, loaded: LoadedModel, other: LoadedModel | None, texts: Texts, *, window: int | None
) -> dict[str, Any]:
    """Perplexity, by windows that overlap by half; of another model too, and how far the two are apart.

    Args:
        screen: for notes and progress.
        loaded: the model.
        other: what it is compared with.
        texts: read whole, whatever their length.
        window: tokens that are read at once; by default 512, or as many as the models can read.
    """
    models = [loaded] if other is None else [loaded, other]
    most = min(max_tokens(each.module) for each in models)
    if window is not None and not 2 <= window <= most:
        raise ValueError(f"`--max-length` must be between 2 and {most}, the positions of the model, got {window}.")
    size = min(_WINDOW, most) if window is None else window
    rows = [_rows(screen, each, loaded, texts) for each in models]
    figures: dict[str, Any] = {"rows": len(texts), "window": size}
    for name, model, tokens in zip(("", "_against"), models, rows, strict=False):
        measured = perplexity(model_logits(model.module), model.params, tokens.ids, window=size, stride=size // 2)
        figures |= {
            f"perplexity{name}": measured.perplexity,
            f"perplexity{name}_interval": [measured.low, measured.high],
            "tokens": measured.count,
        }
    if other is not None:
        if rows[0].ids != rows[1].ids:
            raise ValueError(
                f"{str(loaded.directory)!r} and {str(other.directory)!r} split texts into different tokens: their "
                "distributions cannot be compared."
            )
        both = (loaded.module, loaded.params, other.module, other.params)
        name = f"Comparing {loaded.directory} and {other.directory}"
        divergence = token_divergence(*both, in_windows(rows[0], size), progress=screen, name=name)
        figures |= compare_tokens(*divergence) if len(divergence[0]) > 1 else {"kl": float(np.mean(divergence[0]))}
    return figures


def model_logits(module: nn.Module) -> Callable[[Params, Any, Any], Any]:
    """`(params, input_ids, attention_mask) -> logits` of a language model."""

    def apply(params: Params, ids: Any, mask: Any) -> Any:
        outputs: Any = module.apply({"params": params}, ids, mask)
        return outputs["logits"]

    return apply


def _rows(screen: Screen, model: LoadedModel, first: LoadedModel, texts: Texts) -> Tokens:
    directory = model.directory
    if not has_tokenizer(directory):
        screen.note(f"{directory} has no tokenizer: it reads the rows by that of {first.directory}.")
        directory = first.directory
    return whole_rows(directory, texts, config=config_of(model.module))
