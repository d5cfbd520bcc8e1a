"""The part of `shrink_bert.py` that trains: L0 gates under a size constraint, then distillation of what is left."""

import functools
from typing import Any

import numpy as np
import optax
from flax import linen as nn
from minilm import batches
from workbench import Progress

import jaxcompress as jc
from jaxcompress import gates, structured
from jaxcompress.models import resized, unit_groups
from jaxcompress.recipe import Tokens, Training, train

DISTILLATION = {"temperature": 2.0, "soft_targets": 1.0, "pooled": 1.0, "hidden": 1.0}
FITTED_ROWS = 1024
GATES_AT_END = 0.6
"""Share of the first stage in which the target size comes down."""


def with_gates(
    module: nn.Module,
    dense: Any,
    tokens: Tokens,
    *,
    share: float,
    count: Any,
    epochs: int,
    progress: Progress,
    seed: int = 0,
) -> tuple[nn.Module, Any]:
    """One epoch with gates on heads and FFN columns, Lagrangian and distillation; then the rest at fixed structure.

    Args:
        module: of the dense model.
        dense: its parameters; the teacher.
        tokens: training rows; labels are not used.
        share: of the counted parameters to keep.
        count: selector of the leaves that count.
        epochs: passes over the rows in all; the first is that with gates.
        progress: shows both stages.
        seed: of order and gates.
    """
    groups = unit_groups(module.config)
    first = Training(epochs=1, learning_rate=1e-4, seed=seed, **DISTILLATION)
    steps = len(tokens) // first.batch_size
    costs = structured.parameter_costs(dense, select=count)
    penalty = gates.lagrangian(
        sparsity=1 - share,
        costs=costs,
        warm_up=optax.schedules.linear_schedule(0.0, 1.0, round(GATES_AT_END * steps)),
    )
    transform = gates.hard_concrete(groups, penalty=penalty, drop_rate=0.05)
    params, state = train(
        module,
        dense,
        tokens,
        first,
        teacher=dense,
        transform=transform,
        transform_optimizer=optax.adam(0.05),
        trainable=_not_embeddings(),
        progress=progress,
        name="Gates",
    )
    log_alpha = state.trainable["log_alpha"]
    keep = structured.select_units(log_alpha, groups, params, sparsity=1 - share, costs=costs, rule="rank").keep
    # The gates have found the structure; its weights begin from the dense ones, fitted to do the work of the others.
    rows = np.random.default_rng(seed).permutation(len(tokens))[:FITTED_ROWS]
    fitted, _ = structured.refit(
        lambda p, ids, mask: module.apply({"params": p}, ids, mask)["logits"],
        dense,
        groups,
        keep,
        [(batch["ids"], batch["mask"]) for batch in batches(tokens, rows)],
        row_mask=lambda ids, mask: mask,
    )
    small = structured.shrink(fitted, groups, keep)
    return distilled(module, dense, small, tokens, epochs=epochs - 1, learning_rate=1e-4, progress=progress, seed=seed)


def by_magnitude(
    module: nn.Module,
    dense: Any,
    tokens: Tokens,
    *,
    share: float,
    count: Any,
    epochs: int,
    progress: Progress,
    seed: int = 0,
) -> tuple[nn.Module, Any]:
    """The baseline: units by magnitude, the same share of heads and of columns, and all epochs of distillation."""
    groups = unit_groups(module.config)
    scores = structured.magnitude_unit_scores(dense, groups)
    costs = structured.parameter_costs(dense, select=count)
    keep = structured.select_units(scores, groups, dense, sparsity=1 - share, costs=costs, rule="kind").keep
    small = structured.shrink(dense, groups, keep)
    return distilled(module, dense, small, tokens, epochs=epochs, learning_rate=2e-4, progress=progress, seed=seed)


def distilled(
    module: nn.Module,
    dense: Any,
    small: Any,
    tokens: Tokens,
    *,
    epochs: int,
    learning_rate: float,
    progress: Progress,
    seed: int,
) -> tuple[nn.Module, Any]:
    """Trains a smaller tree to follow the dense model."""
    student = resized(module, small)
    training = Training(epochs=epochs, learning_rate=learning_rate, seed=seed + 1, **DISTILLATION)
    params, _ = train(
        student,
        small,
        tokens,
        training,
        teacher=dense,
        teacher_module=module,
        trainable=_not_embeddings(),
        progress=progress,
        name="Distilling what is left",
    )
    return student, params


@functools.cache
def _not_embeddings() -> Any:
    return jc.tree.exclude(jc.tree.by_path("bert/embeddings/.*"))
