"""A declared pipeline: what to do, how to distil, how to save. Read from TOML, checked before anything runs."""

import dataclasses
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from jaxcompress._src.recipe.calibrate import Calibration
from jaxcompress._src.recipe.methods import METHODS
from jaxcompress._src.recipe.one_shot import calibrates
from jaxcompress._src.recipe.steps import Step, Training, read_step
from jaxcompress._src.recipe.values import read_table

_MOST_BYTES = 2**20  # of a recipe: what is larger is some other file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saving:
    """How the command line writes the result.

    Attributes:
        storage: see `checkpoint.save`; "entropy" for the fewest bytes.
    """

    storage: Literal["orbax", "entropy"] = "orbax"

    def __post_init__(self) -> None:
        """Checks the options."""
        if self.storage not in ("orbax", "entropy"):
            raise ValueError(f"`storage` must be 'orbax' or 'entropy', got {self.storage!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A pipeline. Its stages run in the order of these attributes, the steps of a stage as they are written.

    Attributes:
        shrink: steps that take units out of the arrays.
        prune: steps that set weights to 0.
        lowrank: steps that factorize leaves.
        quantize: steps that round leaves.
        cluster: steps that let weights share values.
        calibrate: the texts that one-shot methods see.
        distil: how the compressed model is trained to follow the original; None: one-shot.
        distil_shared: the same for the last part of the training, in which values are shared; by default `distil`.
        fine_tune: how the demo trains the original model first; not used otherwise.
        save: how the result is written.
    """

    shrink: tuple[Step, ...] = ()
    prune: tuple[Step, ...] = ()
    lowrank: tuple[Step, ...] = ()
    quantize: tuple[Step, ...] = ()
    cluster: tuple[Step, ...] = ()
    calibrate: Calibration = dataclasses.field(default_factory=Calibration)
    distil: Training | None = None
    distil_shared: Training | None = None
    fine_tune: Training | None = None
    save: Saving = Saving()

    def __post_init__(self) -> None:
        """Checks that there is something to do, and nothing that would never be done."""
        if not self.steps:
            *others, last = (f"[[{stage}]]" for stage in METHODS)
            raise ValueError(f"A recipe needs at least one {', '.join(others)} or {last} step.")
        if self.distil_shared is not None and not any(step.trains for step in self.cluster):
            raise ValueError("[distil_shared] trains shared values: it needs a [[cluster]] step that is not frozen.")
        for name, step in self.steps:
            if not self.trains(step):
                try:
                    _ = step.one_shot
                except ValueError as err:
                    raise ValueError(f"{name}: {err}") from err

    @property
    def steps(self) -> tuple[tuple[str, Step], ...]:
        """All steps in the order in which they run, each with its name for messages."""
        return tuple((f"[[{stage}]] {i + 1}", step) for stage in METHODS for i, step in enumerate(getattr(self, stage)))

    @property
    def distils(self) -> bool:
        """Whether it trains."""
        return self.distil is not None or self.distil_shared is not None

    def trains(self, step: Step) -> bool:
        """Whether a step has a training: that of [distil], or of [distil_shared] for shared values."""
        shared = step.stage == "cluster" and self.distil_shared is not None
        return step.trains and (self.distil is not None or shared)

    @property
    def at_once(self) -> tuple[tuple[str, Step], ...]:
        """The steps that run without a training."""
        return tuple((name, step.one_shot) for name, step in self.steps if not self.trains(step))

    @property
    def needs_texts(self) -> bool:
        """Whether there must be rows."""
        return self.distils or self.calibrates

    @property
    def calibrates(self) -> bool:
        """Whether one-shot methods look at texts."""
        return any(calibrates(step) for _, step in self.at_once)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the tables as they were written, and options that were left out where they have a default."""
        tables = {stage: [dict(step.table) for step in getattr(self, stage)] for stage in METHODS}
        names = ("calibrate", "distil", "distil_shared", "fine_tune", "save")
        return tables | {
            name: value and dataclasses.asdict(value) for name in names for value in (getattr(self, name),)
        }


TABLES: Mapping[str, Any] = {
    "calibrate": Calibration,
    "distil": Training,
    "distil_shared": Training,
    "fine_tune": Training,
    "save": Saving,
}
"""The tables of a recipe that are no steps."""


def packaged_recipes() -> tuple[str, ...]:
    """Names of the recipes that come with the library."""
    files = resources.files("jaxcompress._src.recipe").joinpath("recipes").iterdir()
    return tuple(sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")))


def read_recipe(source: str | Path) -> Recipe:
    """Reads a recipe from a TOML file, or one that comes with the library by its name.

    Args:
        source: path of a file, or a name among `packaged_recipes`.

    Raises:
        OSError: neither, or the file cannot be read.
        ValueError: not TOML, an unknown table or option, a value of the wrong type or out of range; names the file,
            the table and the option.

    Example:
        >>> read_recipe("int4").quantize[0].keywords["spec"].bits
        4
    """
    text = recipe_text(source)
    try:
        return _parse(tomllib.loads(text))
    except (ValueError, TypeError) as err:
        raise ValueError(f"Recipe {str(source)!r}: {err}") from err
    except RecursionError:
        raise ValueError(f"Recipe {str(source)!r}: its values are nested too deeply.") from None


def recipe_text(source: str | Path) -> str:
    """What is written in a recipe.

    Raises:
        OSError: as `read_recipe`.
        ValueError: it is no text.
    """
    if str(source) in packaged_recipes():
        return resources.files("jaxcompress._src.recipe").joinpath("recipes", f"{source}.toml").read_text("utf-8")
    path = Path(source)
    if not path.is_file():
        found = "is not a file" if path.exists() else "does not exist"
        raise FileNotFoundError(
            f"The recipe file {str(path)!r} {found}; recipes of the library: {', '.join(packaged_recipes())}."
        )
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as err:
        raise OSError(f"The recipe file {str(path)!r} cannot be read: {err.strerror}.") from err
    if len(content) > _MOST_BYTES:
        raise ValueError(f"Recipe {str(path)!r}: it has more than {_MOST_BYTES} bytes, so it is not a recipe.")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as err:
        line = content[: err.start].count(b"\n") + 1
        raise ValueError(f"Recipe {str(path)!r}: line {line} is not UTF-8 text; a recipe is a TOML file.") from None


def _parse(tables: Mapping[str, Any]) -> Recipe:
    unknown = sorted(set(tables) - {*METHODS, *TABLES})
    if unknown:
        raise ValueError(f"unknown table {unknown[0]!r}; known are {', '.join([*METHODS, *TABLES])}.")
    for stage in METHODS:
        if not isinstance(tables.get(stage, []), list):
            raise ValueError(f"`{stage}` is a list of tables: write [[{stage}]].")
    read: dict[str, Any] = {
        stage: tuple(_step(stage, f"[[{stage}]] {i + 1}", table) for i, table in enumerate(tables.get(stage, [])))
        for stage in METHODS
    }
    read |= {name: read_table(cls, f"[{name}]", tables[name]) for name, cls in TABLES.items() if name in tables}
    return Recipe(**read)


def _step(stage: str, name: str, table: Any) -> Step:
    if not isinstance(table, dict):
        raise ValueError(f"{name} must be a table of options, found {table!r}.")
    try:
        return read_step(stage, table)
    except (ValueError, TypeError) as err:
        raise ValueError(f"{name}: {err}") from err
