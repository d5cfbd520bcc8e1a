"""What a config may hold: checks that name the option and what was given, for all families."""

import math
from typing import Any

MOST_LAYERS = 10_000
"""Sizes are kept for each layer: a slip of the pen would fill the memory with them."""


def check_count(name: str, value: Any, *, minimum: int) -> None:
    """Raises where an option is no int of at least `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"`{name}` must be an int of at least {minimum}, got {value!r}.")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises where an option is none of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def per_layer(name: str, value: Any, layers: int) -> tuple[int, ...]:
    """A size of each layer: a tuple or list of them, or one for all; raises where they are no ints of at least 0."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * layers
    if len(values) != layers:
        raise ValueError(f"`{name}` must have one entry for each of {layers} layers, got {len(values)}: {value!r}.")
    for entry in values:
        check_count(name, entry, minimum=0)
    return values


def default_head_size(hidden_size: int, heads: tuple[int, ...]) -> int:
    """The width of one head where all of them make up the hidden size; raises where they do not."""
    if len(set(heads)) != 1 or heads[0] == 0 or hidden_size % heads[0]:
        raise ValueError(
            f"`head_size` must be given when `hidden_size` ({hidden_size}) is not a multiple of one number of heads: "
            f"`num_attention_heads` is {heads}."
        )
    return hidden_size // heads[0]


def probability(name: str, value: Any) -> float | None:
    """A float in [0, 1), or None for a `classifier_dropout` that is left out; raises for anything else."""
    if value is None and name == "classifier_dropout":
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
        raise ValueError(f"`{name}` must be in [0, 1), got {value!r}.")
    return float(value)


def positive(name: str, value: Any) -> float:
    """A finite float above 0; raises for anything else."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be a finite number above 0, got {value!r}.")
    return float(value)


def label_names(labels: Any, count: int) -> tuple[str, ...]:
    """The names of all classes, or none; raises for another number of them."""
    if labels and len(labels) != count:
        raise ValueError(f"`id2label` must name each of `num_labels`={count} classes, got {len(labels)}: {labels!r}.")
    return tuple(labels)
