"""What one-shot methods see of a model: texts that run through it, and what is measured on them."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxcompress._src.calibration.gradients import fisher
from jaxcompress._src.calibration.input_statistics import input_statistics
from jaxcompress._src.calibration.splice import spliced
from jaxcompress._src.execution.execute import execute
from jaxcompress._src.models.families import head_of, max_tokens
from jaxcompress._src.models.hf.companions import SentencePooling
from jaxcompress._src.quantization.input_ranges import input_ranges
from jaxcompress._src.quantization.spec import QuantSpec
from jaxcompress._src.recipe.heads import SENTENCE_VECTOR, with_sentence_vector
from jaxcompress._src.recipe.tokens import Tokens, evaluation_batches, example_batches, row_widths
from jaxcompress._src.recipe.values import check_numbers
from jaxcompress._src.trace.folds import Fold, folds
from jaxcompress._src.trace.layouts import layouts
from jaxcompress._src.types import Params, Selector


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Which texts one-shot methods see, and how their tokens count.

    Attributes:
        rows: number of texts, drawn without replacement.
        batch_size: texts in a batch.
        seed: of the choice of texts, and of the labels that are drawn for Fisher information.
        splice: this many more texts for each one, made of the beginning of one and the end of another; 0: none.
        weigh: what a token counts. "token": all the same. "text": all texts the same, as in a mean over their tokens.
        labels: what Fisher information is taken of. "drawn": labels that the model itself draws, for each text from its
            own distribution. "given": the column `label`.
    """

    rows: int = 128
    batch_size: int = 32
    seed: int = 0
    splice: int = 0
    weigh: Literal["token", "text"] = "token"
    labels: Literal["drawn", "given"] = "drawn"

    def __post_init__(self) -> None:
        """Checks the options."""
        check_numbers(self)
        for name, least in (("rows", 1), ("batch_size", 1), ("seed", 0), ("splice", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        for name, known in (("weigh", ("token", "text")), ("labels", ("drawn", "given"))):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be {known[0]!r} or {known[1]!r}, got {getattr(self, name)!r}.")


class Evidence:
    """The texts of a calibration in batches, and what is measured on them.

    Args:
        settings: which texts.
        module: the model.
        tokens: all rows.
        pooling: of the sentence vectors of a plain encoder.

    Raises:
        ValueError: there are fewer rows than `settings.rows`, or labels are asked for that the rows do not have.
    """

    def __init__(self, settings: Calibration, module: nn.Module, tokens: Tokens, *, pooling: SentencePooling) -> None:
        if len(tokens) < settings.rows:
            raise ValueError(f"[calibrate]: `rows` is {settings.rows}, and there are only {len(tokens)} rows.")
        self._settings, self._module = settings, module
        self._pooling: SentencePooling = pooling
        places = np.sort(np.random.default_rng(settings.seed).choice(len(tokens), settings.rows, replace=False))
        ids = tuple(tokens.ids[i] for i in places)
        self._rows = dataclasses.replace(tokens, ids=ids, labels=tokens.labels[places])
        if settings.labels == "given" and not (self._rows.labels >= 0).all():
            raise ValueError("[calibrate]: `labels` is 'given', and a row has none; give a column `label`.")
        more = tuple(spliced(ids, settings.splice, seed=settings.seed)) if settings.splice else ()
        self._texts = dataclasses.replace(tokens, ids=ids + more, labels=np.full(len(ids) + len(more), -1, np.int32))

    def apply(self, params: Params, ids: Any, mask: Any) -> jax.Array:
        """The output by which models are compared: logits, or sentence vectors."""
        outputs = with_sentence_vector(self._module, self._outputs(params, ids, mask), mask, self._pooling)
        return outputs[SENTENCE_VECTOR if SENTENCE_VECTOR in outputs else "logits"]

    def hidden(self, params: Params, ids: Any, mask: Any) -> jax.Array:
        """The last hidden states."""
        return self._outputs(params, ids, mask)["last_hidden_state"]

    def row_mask(self, ids: Any, mask: Any) -> Any:
        """What each token counts; 0 for padding."""
        del ids
        if self._settings.weigh == "token":
            return mask
        return mask / np.maximum(np.asarray(mask).sum(axis=1, keepdims=True), 1)

    @functools.cached_property
    def batches(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """`(ids, mask)`; rows that fill up a batch are masked out altogether."""
        return [(b["input_ids"], b["attention_mask"] * (b["row"] >= 0)[:, None]) for b in self._made(self._texts)]

    def examples(self, params: Params) -> list[dict[str, np.ndarray]]:
        """Batches for `loss`, every text once: labels are given, or drawn from the outputs of these parameters."""
        run = jax.jit(execute(self.apply))
        rng, examples = np.random.default_rng(self._settings.seed), []
        batch_size, widths = self._settings.batch_size, self._widths(self._rows)
        for batch in example_batches(self._rows, batch_size=batch_size, widths=widths):
            ids, mask, given = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
            outputs = np.asarray(run(params, ids, mask), np.float32)
            if head_of(self._module).answer == "vector":
                target = rng.normal(size=outputs.shape).astype(np.float32)
            elif self._settings.labels == "given":
                target = given
            else:
                # The largest of logits with Gumbel noise is a draw from their softmax.
                target = (outputs + rng.gumbel(size=outputs.shape)).argmax(-1).astype(np.int32)
            examples.append({"ids": ids, "mask": mask, "target": target})
        return examples

    def loss(self, params: Params, batch: Any) -> jax.Array:
        """Negative log likelihood of labels; of sentence vectors, as if they were means of normal distributions."""
        outputs, target = execute(self.apply)(params, batch["ids"], batch["mask"]), batch["target"]
        if head_of(self._module).answer == "vector":
            return (outputs * target).sum(-1).mean()
        losses = -jnp.take_along_axis(jax.nn.log_softmax(outputs), target[..., None], axis=-1)[..., 0]
        return (losses * (batch["mask"] if losses.ndim == 2 else 1)).reshape(len(target), -1).sum(axis=-1).mean()

    def layouts(self, params: Params) -> Params:
        """What the model does with each leaf."""
        return layouts(self.apply, params, *self.batches[0])

    def folds(self, params: Params) -> list[Fold]:
        """Where factors can move from a matmul's inputs into what makes them."""
        return list(folds(self.apply, params, *self.batches[0]))

    def statistics(self, params: Params, select: Selector | None = None) -> Params:
        """Sums over the inputs of each leaf."""
        return input_statistics(self.apply, params, self.batches, select=select, row_mask=self.row_mask)

    def input_ranges(self, params: Params, spec: QuantSpec, select: Selector) -> Params:
        """Static ranges of the inputs of each leaf."""
        return input_ranges(self.apply, params, self.batches, spec, select=select, row_mask=self.row_mask)

    def fisher(self, params: Params) -> Params:
        """Fisher information of every weight."""
        return fisher(self.loss, params, self.examples(params))

    def _outputs(self, params: Params, ids: Any, mask: Any) -> Any:
        return self._module.apply({"params": params}, ids, mask)

    def _made(self, tokens: Tokens) -> list[dict[str, Any]]:
        size = self._settings.batch_size
        return list(evaluation_batches(tokens, batch_size=size, widths=self._widths(tokens)))

    def _widths(self, tokens: Tokens) -> tuple[int, ...]:
        return row_widths(tokens, most=max_tokens(self._module))
