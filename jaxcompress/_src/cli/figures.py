"""Figures of one model against another on the same rows; intervals are 95 %."""

from typing import Any

import numpy as np

from jaxcompress._src.report.divergence import kl_divergence
from jaxcompress._src.report.mean import sample_mean
from jaxcompress._src.report.paired import agreement as report_agreement
from jaxcompress._src.report.paired import paired_difference


def compare_logits(reference: np.ndarray, logits: np.ndarray, labels: np.ndarray | None) -> dict[str, Any]:
    """Two classifiers.

    Args:
        reference: logits of the reference, (rows, classes).
        logits: of the model.
        labels: the truth where it is known, -100 elsewhere.
    """
    agreement = report_agreement(reference.argmax(-1), logits.argmax(-1))
    divergence = kl_divergence(reference, logits)
    figures: dict[str, Any] = {
        "agreement": agreement.rate,
        "agreement_interval": [agreement.low, agreement.high],
        "kl": divergence.mean,
        "kl_interval": [divergence.low, divergence.high],
    }
    if labels is not None and (labels >= 0).sum() > 1:
        known = labels >= 0
        difference = paired_difference(
            *((each.argmax(-1) == labels)[known] for each in (logits, reference)),
        )
        figures |= {
            "accuracy_difference": difference.difference,
            "accuracy_difference_interval": [difference.low, difference.high],
        }
    return figures


def compare_vectors(reference: np.ndarray, vectors: np.ndarray) -> dict[str, Any]:
    """Two encoders: the cosine of the vectors of each row, and how far they are apart, ||v - v'|| / ||v||.

    Args:
        reference: sentence vectors of the reference, (rows, features).
        vectors: of the model.
    """
    v, w = reference.astype(np.float64), vectors.astype(np.float64)
    sizes = [np.linalg.norm(x, axis=-1) for x in (v, w)]
    cosine = (v * w).sum(-1) / np.maximum(sizes[0] * sizes[1], 1e-30)
    error = np.linalg.norm(v - w, axis=-1) / np.maximum(sizes[0], 1e-30)
    return _means(cosine=cosine, vector_error=error)


def compare_tokens(divergence: np.ndarray, agreement: np.ndarray) -> dict[str, Any]:
    """Two masked language models, by what `recipe.token_divergence` gives for each row."""
    return _means(agreement=agreement, kl=divergence)


def _means(**by_row: np.ndarray) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, values in by_row.items():
        mean = sample_mean(values)
        figures |= {name: mean.mean, f"{name}_interval": [mean.low, mean.high]}
    return figures
