"""A declared pipeline: what to do, how to distil, how to save. Read from TOML, checked before anything runs."""

import dataclasses
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from jaxcompress._src.recipe.steps import ClusterStep, PruneStep, QuantizeStep, Training
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
    """A pipeline.

    Attributes:
        prune: pruning steps, applied in order.
        quantize: quantization steps, after pruning.
        cluster: steps that let weights share values, after pruning.
        distil: how the compressed model is trained to follow the original; None: one-shot.
        distil_shared: the same for the second part of the training, in which values are shared; by default `distil`.
        fine_tune: how the demo trains the original model first; not used otherwise.
        save: how the result is written.
    """

    prune: tuple[PruneStep, ...] = ()
    quantize: tuple[QuantizeStep, ...] = ()
    cluster: tuple[ClusterStep, ...] = ()
    distil: Training | None = None
    distil_shared: Training | None = None
    fine_tune: Training | None = None
    save: Saving = Saving()

    def __post_init__(self) -> None:
        """Checks that there is something to do, and nothing that would never be done."""
        if not self.prune and not self.quantize and not self.cluster:
            raise ValueError("A recipe needs at least one [[prune]], [[quantize]] or [[cluster]] step.")
        if self.distil_shared is not None and all(step.frozen for step in self.cluster):
            raise ValueError("[distil_shared] trains shared values: it needs a [[cluster]] step that is not frozen.")

    @property
    def distils(self) -> bool:
        """Whether texts are needed."""
        return self.distil is not None or self.distil_shared is not None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


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
        >>> read_recipe("int4").quantize[0].bits
        4
    """
    if str(source) in packaged_recipes():
        text = resources.files("jaxcompress._src.recipe").joinpath("recipes", f"{source}.toml").read_text("utf-8")
    else:
        text = _text(Path(source))
    try:
        return _parse(tomllib.loads(text))
    except (ValueError, TypeError) as err:
        raise ValueError(f"Recipe {str(source)!r}: {err}") from err
    except RecursionError:
        raise ValueError(f"Recipe {str(source)!r}: its values are nested too deeply.") from None


def _text(path: Path) -> str:
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
    lists = {"prune": PruneStep, "quantize": QuantizeStep, "cluster": ClusterStep}
    singles = {"distil": Training, "distil_shared": Training, "fine_tune": Training, "save": Saving}
    unknown = sorted(set(tables) - {*lists, *singles})
    if unknown:
        raise ValueError(f"unknown table {unknown[0]!r}; known are {', '.join([*lists, *singles])}.")
    for name in lists:
        if not isinstance(tables.get(name, []), list):
            raise ValueError(f"`{name}` is a list of tables: write [[{name}]].")
    read: dict[str, Any] = {
        name: tuple(read_table(cls, f"[[{name}]] {i + 1}", table) for i, table in enumerate(tables.get(name, [])))
        for name, cls in lists.items()
    }
    read |= {name: read_table(cls, f"[{name}]", tables[name]) for name, cls in singles.items() if name in tables}
    return Recipe(**read)
