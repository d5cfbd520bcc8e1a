"""A declared pipeline: what to prune, what to quantize, how to distil. Read from TOML, checked before anything runs."""

import dataclasses
import tomllib
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jaxcompress.pruning import Pattern, Scope, n_of_m, unstructured
from jaxcompress.quantization import QuantSpec


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
        if not 0.0 <= self.sparsity <= 1.0:
            raise ValueError(f"`sparsity` must be in [0, 1], got {self.sparsity}.")
        if not 0.0 <= self.begin < self.end <= 1.0:
            raise ValueError(f"`begin` and `end` must be 0 <= begin < end <= 1, got {self.begin} and {self.end}.")
        if self.scope not in typing.get_args(Scope):
            raise ValueError(f"`scope` must be leaf, global or row, got {self.scope!r}.")
        if self.every < 1:
            raise ValueError(f"`every` must be at least 1, got {self.every}.")
        self.parsed_pattern()

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
    """

    select: str
    bits: int
    frozen: bool = False
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: str = "bfloat16"
    convention: str = "narrow"

    def __post_init__(self) -> None:
        """Checks the options."""
        self.spec()

    def spec(self) -> QuantSpec:
        """The specification of the numbers."""
        names = ("bits", "group_size", "symmetric", "scale_dtype", "convention")
        return QuantSpec(**{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """One training: fine-tuning or distillation, by AdamW with linear warm-up and cosine decay.

    Attributes:
        epochs: passes over the rows.
        learning_rate: the highest.
        batch_size: rows in a batch.
        widths: rows are padded to the narrowest of these that holds them; each is one compilation.
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
    widths: tuple[int, ...] = (24, 32, 48, 64)
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
        for name, value in (("epochs", self.epochs), ("batch_size", self.batch_size)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` must be positive, got {self.learning_rate}.")
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"`warmup` is a share of the steps and must be in [0, 1), got {self.warmup}.")
        if not self.widths or list(self.widths) != sorted(set(self.widths)) or self.widths[0] < 1:
            raise ValueError(f"`widths` must be positive and ascending, got {list(self.widths)}.")
        weights = {name: getattr(self, name) for name in ("soft_targets", "pooled", "hidden", "hard_labels")}
        if min(weights.values()) < 0 or not any(weights.values()):
            raise ValueError(f"At least one loss needs a positive weight, and none a negative one, got {weights}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A pipeline.

    Attributes:
        prune: pruning steps, applied in order.
        quantize: quantization steps, after pruning.
        distil: how the compressed model is trained to follow the original; None: one-shot.
        fine_tune: how the demo trains the original model first; not used otherwise.
    """

    prune: tuple[PruneStep, ...] = ()
    quantize: tuple[QuantizeStep, ...] = ()
    distil: Training | None = None
    fine_tune: Training | None = None

    def __post_init__(self) -> None:
        """Checks that there is something to do."""
        if not self.prune and not self.quantize:
            raise ValueError("A recipe needs at least one [[prune]] or [[quantize]] step.")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def packaged_recipes() -> tuple[str, ...]:
    """Names of the recipes that come with the library."""
    files = resources.files("jaxcompress.recipe").joinpath("recipes").iterdir()
    return tuple(sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")))


def read_recipe(source: str | Path) -> Recipe:
    """Reads a recipe from a TOML file, or one that comes with the library by its name.

    Args:
        source: path of a file, or a name among `packaged_recipes`.

    Raises:
        FileNotFoundError: neither.
        ValueError: not TOML, an unknown table or option, a value of the wrong type or out of range; names the file,
            the table and the option.

    Example:
        >>> read_recipe("int4").quantize[0].bits
        4
    """
    if str(source) in packaged_recipes():
        text = resources.files("jaxcompress.recipe").joinpath("recipes", f"{source}.toml").read_text("utf-8")
    elif Path(source).is_file():
        text = Path(source).read_text("utf-8")
    else:
        raise FileNotFoundError(
            f"There is no recipe file {str(source)!r}; recipes of the library: {', '.join(packaged_recipes())}."
        )
    try:
        return _parse(tomllib.loads(text))
    except (ValueError, TypeError) as err:
        raise ValueError(f"Recipe {str(source)!r}: {err}") from err


def _parse(tables: Mapping[str, Any]) -> Recipe:
    lists = {"prune": PruneStep, "quantize": QuantizeStep}
    singles = {"distil": Training, "fine_tune": Training}
    unknown = sorted(set(tables) - {*lists, *singles})
    if unknown:
        raise ValueError(f"unknown table {unknown[0]!r}; known are {', '.join([*lists, *singles])}.")
    for name in lists:
        if not isinstance(tables.get(name, []), list):
            raise ValueError(f"`{name}` is a list of tables: write [[{name}]].")
    read: dict[str, Any] = {
        name: tuple(_read(cls, f"[[{name}]] {i + 1}", table) for i, table in enumerate(tables.get(name, [])))
        for name, cls in lists.items()
    }
    read |= {name: _read(cls, f"[{name}]", tables[name]) for name, cls in singles.items() if name in tables}
    return Recipe(**read)


def _read(cls: Any, name: str, table: Any) -> Any:
    if not isinstance(table, dict):
        raise ValueError(f"{name} must be a table of options, found {table!r}.")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(table) - set(fields))
    if unknown:
        raise ValueError(f"{name}: unknown option {unknown[0]!r}; known are {', '.join(fields)}.")
    missing = [key for key, field in fields.items() if field.default is dataclasses.MISSING and key not in table]
    if missing:
        raise ValueError(f"{name}: the option {missing[0]!r} is needed.")
    try:
        return cls(**{key: _value(key, hints[key], value) for key, value in table.items()})
    except ValueError as err:
        raise ValueError(f"{name}: {err}") from err


def _value(name: str, hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_value(name, int, item) for item in value)
    kinds = typing.get_args(hint) or (hint,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) != (bool in kinds) or not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
        raise ValueError(f"`{name}` must be of type {wanted}, found {value!r}.")
    return value
