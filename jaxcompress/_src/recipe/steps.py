"""The steps of a recipe: what is done to which leaves, and how a model is trained meanwhile."""

import dataclasses
import typing
from typing import Literal

from jaxcompress._src.clustering.spec import CodebookSpec
from jaxcompress._src.pruning.patterns import Pattern, n_of_m, unstructured
from jaxcompress._src.pruning.ranking import Scope
from jaxcompress._src.quantization.spec import QuantSpec
from jaxcompress._src.recipe.values import check_numbers, check_select


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneStep:
    """Gradual magnitude pruning (one-shot without distillation).

    Attributes:
        select: regular expression over whole paths.
        sparsity: share of zeros at the end, in [0, 1].
        pattern: "unstructured" or "N:M", N kept of every M.
        scope: "leaf", "global" or "row".
        begin: share of the training steps at which pruning begins.
        end: share at which the final sparsity is reached.
        every: steps between two rankings.
    """

    select: str
    sparsity: float
    pattern: str = "unstructured"
    scope: str = "leaf"
    begin: float = 0.0
    end: float = 0.5
    every: int = 10

    def __post_init__(self) -> None:
        """Checks the options."""
        check_select(self.select)
        check_numbers(self)
        if not 0.0 <= self.sparsity <= 1.0:
            raise ValueError(f"`sparsity` must be in [0, 1], got {self.sparsity}.")
        if not 0.0 <= self.begin < self.end <= 1.0:
            raise ValueError(f"`begin` and `end` must be 0 <= begin < end <= 1, got {self.begin} and {self.end}.")
        if self.scope not in typing.get_args(Scope):
            raise ValueError(f"`scope` must be leaf, global or row, got {self.scope!r}.")
        if self.every < 1:
            raise ValueError(f"`every` must be at least 1, got {self.every}.")
        allowed = self.parsed_pattern().allowed
        if self.sparsity > allowed + 1e-6:
            raise ValueError(
                f"`pattern` {self.pattern} allows a `sparsity` of at most {allowed:g}, got {self.sparsity:g}."
            )

    def parsed_pattern(self) -> Pattern:
        """The pattern that `pattern` names."""
        if self.pattern == "unstructured":
            return unstructured()
        kept, separator, run = self.pattern.partition(":")
        if separator and kept.isdigit() and run.isdigit():
            return n_of_m(int(kept), int(run))
        raise ValueError(f"`pattern` must be unstructured or N:M (such as 2:4), got {self.pattern!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeStep:
    """Fake quantization while distilling, then real; or, `frozen`, quantized before and not trained.

    Attributes:
        select: regular expression over whole paths.
        frozen: quantize before the distillation, and leave those leaves as they are.
        bits: see `QuantSpec`, as the following ones.
        group_size: see `QuantSpec`.
        symmetric: see `QuantSpec`.
        scale_dtype: see `QuantSpec`.
        convention: see `QuantSpec`.
        partial_groups: see `QuantSpec`.
    """

    select: str
    bits: int
    frozen: bool = False
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: Literal["float32", "bfloat16", "e8m0"] = "bfloat16"
    convention: Literal["narrow", "full"] | None = None
    partial_groups: bool = False

    def __post_init__(self) -> None:
        """Checks the options."""
        check_select(self.select)
        check_numbers(self)
        self.spec()

    def spec(self) -> QuantSpec:
        """The specification of the numbers."""
        names = ("bits", "group_size", "symmetric", "scale_dtype", "convention", "partial_groups")
        return QuantSpec(**{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterStep:
    """Weights that share a few values, found when pruning has ended; then the values are trained while distilling.

    Attributes:
        select: regular expression over whole paths.
        values: see `CodebookSpec`, as the following ones.
        zero: see `CodebookSpec`.
        per: see `CodebookSpec`.
        group_size: see `CodebookSpec`.
        rate: see `CodebookSpec`.
        dtype: see `CodebookSpec`.
        frozen: share values before the distillation, and leave those leaves as they are.
        until: share of the training up to which weights move too and go to other values (with `zero`, what is
            0 stays 0); then only values do.
        every: steps between two such assignments.
        store: "dense" (fewest bytes in an entropy-coded file), or "sparse": codes of 0 are left out under a bit mask.
    """

    select: str
    values: int
    zero: bool = True
    per: Literal["leaf", "output"] = "leaf"
    group_size: int | None = None
    rate: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    frozen: bool = False
    until: float = 0.0
    every: int = 10
    store: Literal["dense", "sparse"] = "dense"

    def __post_init__(self) -> None:
        """Checks the options."""
        check_select(self.select)
        check_numbers(self)
        self.spec()
        if not 0.0 <= self.until <= 1.0:
            raise ValueError(f"`until` is a share of the training and must be in [0, 1], got {self.until}.")
        if self.frozen and self.until:
            raise ValueError(
                f"`until` must be 0 if `frozen` is true, got {self.until}: frozen leaves do not train; leave one out."
            )
        if self.every < 1:
            raise ValueError(f"`every` must be at least 1, got {self.every}.")
        if self.store not in ("dense", "sparse") or (self.store == "sparse" and not (self.zero and not self.frozen)):
            raise ValueError(
                f"`store` must be 'dense', or 'sparse' if `zero` is true and `frozen` is not, got {self.store!r}."
            )

    def spec(self) -> CodebookSpec:
        """The specification of the values."""
        names = ("values", "zero", "per", "group_size", "rate", "dtype")
        return CodebookSpec(**{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """One training: fine-tuning or distillation, by AdamW with linear warm-up and cosine decay.

    Attributes:
        epochs: passes over the rows.
        learning_rate: the highest.
        batch_size: rows in a batch.
        widths: rows are padded to the narrowest of these that holds them, and cut to the last one; each is one
            compilation. By default, `row_widths` of the rows: nothing is cut that `tokenize` has not cut.
        warmup: share of the steps in which the learning rate rises.
        weight_decay: of AdamW.
        dropout: whether the model's dropout is on.
        temperature: T of the soft targets.
        soft_targets: weight of T² KL(teacher || student).
        pooled: weight of the mean squared error of the pooled vectors.
        hidden: weight of the mean squared error of the hidden states of all layers.
        hard_labels: weight of the cross-entropy with the labels.
        seed: of order and dropout.
    """

    epochs: int
    learning_rate: float
    batch_size: int = 32
    widths: tuple[int, ...] = ()
    warmup: float = 0.1
    weight_decay: float = 0.0
    dropout: bool = False
    temperature: float = 1.0
    soft_targets: float = 0.0
    pooled: float = 0.0
    hidden: float = 0.0
    hard_labels: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the options."""
        check_numbers(self)
        for name, value in (("epochs", self.epochs), ("batch_size", self.batch_size)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.seed < 0:
            raise ValueError(f"`seed` must not be negative, got {self.seed}.")
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` must be positive, got {self.learning_rate}.")
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be positive, got {self.temperature}.")
        if not self.weight_decay >= 0:
            raise ValueError(f"`weight_decay` must not be negative, got {self.weight_decay}.")
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"`warmup` is a share of the steps and must be in [0, 1), got {self.warmup}.")
        if list(self.widths) != sorted(set(self.widths)) or min(self.widths, default=1) < 1:
            raise ValueError(f"`widths` must be positive and ascending, got {list(self.widths)}.")
        weights = {name: getattr(self, name) for name in ("soft_targets", "pooled", "hidden", "hard_labels")}
        if min(weights.values()) < 0 or not any(weights.values()):
            raise ValueError(f"At least one loss needs a positive weight, and none a negative one, got {weights}.")
