"""A declared pipeline: what to do, how to distil, how to save. Read from TOML, checked before anything runs."""

import dataclasses
import tomllib
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from jaxcompress.recipe._steps import ClusterStep, PruneStep, QuantizeStep, Training


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
    lists = {"prune": PruneStep, "quantize": QuantizeStep, "cluster": ClusterStep}
    singles = {"distil": Training, "distil_shared": Training, "fine_tune": Training, "save": Saving}
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
    if typing.get_origin(hint) is Literal:
        if value not in kinds:
            raise ValueError(f"`{name}` must be {' or '.join(map(repr, kinds))}, found {value!r}.")
        return value
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) != (bool in kinds) or not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
        raise ValueError(f"`{name}` must be of type {wanted}, found {value!r}.")
    return value
