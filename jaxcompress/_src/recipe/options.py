"""Keywords of functions as options of a TOML table: which there are, what they take, what they are for.

A keyword is an option if a file can say its value. A specification (`QuantSpec`, `CodebookSpec`) is spread: its fields
are options of the step. What counts training steps is written as a share of the training.
"""

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax.numpy as jnp
import optax

from jaxcompress._src.clustering.additive_spec import AdditiveSpec
from jaxcompress._src.clustering.spec import CodebookSpec
from jaxcompress._src.lowrank.ranks import budget, energy, parameter_share
from jaxcompress._src.pruning.allocation import erdos_renyi, erdos_renyi_kernel, uniform
from jaxcompress._src.pruning.patterns import Pattern, n_of_m, unstructured
from jaxcompress._src.quantization.spec import FORMATS, QuantSpec
from jaxcompress._src.recipe.values import check_number, read_value
from jaxcompress._src.schedules import constant, cubic
from jaxcompress._src.types import Schedule
from jaxcompress._src.units.lagrangian import lagrangian, smallest_with

NEEDED: Any = object()
"""The default of an option that must be given."""

_SPECS = (QuantSpec, CodebookSpec, AdditiveSpec)
_ALLOCATIONS = {"erdos_renyi": erdos_renyi, "erdos_renyi_kernel": erdos_renyi_kernel, "uniform": uniform}
_RANKS = {"budget": budget, "energy": energy, "parameter_share": parameter_share}
PENALTIES = {"lagrangian": lagrangian, "smallest_with": smallest_with}
_NUMBERS = ("sparsity", "threshold", "strength", "fraction", "drop_rate")
"""Keywords that take a number beside what a file cannot say: a tree, a schedule."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a table.

    Attributes:
        name: in the file.
        kind: type of its value, as `values.read_value` takes it; None: a table, which the keyword reads itself.
        default: its value where the file leaves it out; `NEEDED` if it must not.
        help: what it is for, from the docstring.
    """

    name: str
    kind: Any
    default: Any
    help: str


@dataclasses.dataclass(frozen=True)
class OverTraining:
    """The value of a keyword that depends on the length of the training.

    Attributes:
        at: number of steps -> value.
    """

    at: Callable[[int], Any]


@dataclasses.dataclass(frozen=True)
class _Keyword:
    """How a file says one keyword.

    Attributes:
        options: one, or several that make it together.
        build: values of the options that are given -> value of the keyword.
    """

    options: tuple[Option, ...]
    build: Callable[[dict[str, Any]], Any]


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """The options of a function, or of a class of settings, by name.

    Example:
        >>> from jaxcompress.pruning import sr_ste
        >>> [(option.name, option.kind.__name__) for option in options_of(sr_ste).values()][:3]
        [('n', 'int'), ('m', 'int'), ('strength', 'float')]
    """
    return {option.name: option for keyword in _keywords(function).values() for option in keyword.options}


def read_options(
    function: Callable[..., Any], table: Mapping[str, Any], *, defaults: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Keywords of a function from the options in a table.

    Args:
        function: see `options_of`.
        table: parsed TOML.
        defaults: values of options that the table leaves out, where they are not those of the function.

    Returns:
        The keywords by name; values that depend on the length of the training are `OverTraining`.

    Raises:
        ValueError: an unknown or a missing option, a value of the wrong type or out of range; names the option.

    Example:
        >>> from jaxcompress.quantization import hqq
        >>> given = read_options(hqq, {"bits": 4, "group_size": 32, "norm": 0.5})
        >>> given["norm"], given["spec"].group_size
        (0.5, 32)
    """
    keywords = _keywords(function)
    options = {option.name: option for keyword in keywords.values() for option in keyword.options}
    unknown = sorted(set(table) - set(options))
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; known are {', '.join(options)}.")
    missing = [name for name, option in options.items() if option.default is NEEDED and name not in table]
    if missing:
        raise ValueError(f"the option {missing[0]!r} is needed.")
    values = {name: _value(options[name], value) for name, value in table.items()}
    values = {**defaults, **values}
    _check_sparsity(values)
    given = {
        name: {o.name: values[o.name] for o in word.options if o.name in values} for name, word in keywords.items()
    }
    return {name: keywords[name].build(entry) for name, entry in given.items() if entry}


def at_steps(keywords: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Keywords of a function for a training of so many steps."""
    return {name: value.at(steps) if isinstance(value, OverTraining) else value for name, value in keywords.items()}


def parsed_pattern(text: str) -> Pattern:
    """The pattern that a file names: "unstructured" or "N:M"."""
    if text == "unstructured":
        return unstructured()
    kept, separator, run = text.partition(":")
    if separator and kept.isdigit() and run.isdigit():
        return n_of_m(int(kept), int(run))
    raise ValueError(f"`pattern` must be unstructured or N:M (such as 2:4), got {text!r}.")


@functools.cache
def _keywords(function: Callable[..., Any]) -> dict[str, _Keyword]:
    texts = argument_texts(function)
    keywords = {p.name: _keyword(p, texts.get(p.name, "")) for p in inspect.signature(function).parameters.values()}
    return {name: keyword for name, keyword in keywords.items() if keyword is not None}


def _keyword(parameter: inspect.Parameter, text: str) -> _Keyword | None:
    """How a file says a keyword; None if it cannot."""
    name, hint = parameter.name, parameter.annotation
    default = NEEDED if parameter.default is parameter.empty else parameter.default
    kinds = [kind for kind in _members(hint) if kind is not types.NoneType]

    def one(kind: Any, build: Callable[[Any], Any] = lambda value: value, *, default: Any = default) -> _Keyword:
        shown = default if default is NEEDED or not callable(default) else None
        option = Option(name=name, kind=kind, default=shown, help=text)
        return _Keyword((option,), lambda given: build(given[name]))

    spec = next((kind for kind in kinds if kind in _SPECS), None)
    if spec is not None:
        return _Keyword(tuple(options_of(spec).values()), lambda given: spec(**given))
    if hint == Schedule:
        return {"schedule": _ramp, "warm_up": lambda: one(float, _rise, default=0.0)}.get(name, lambda: None)()
    if Pattern in kinds:
        text = '"unstructured", or "N:M": N of every M consecutive inputs are kept.'
        return one(str, parsed_pattern, default="unstructured")
    if name in ("until", "freeze_at") or (name == "begin" and hint is int):
        return one(float, _share_of_training(name), default=default or 0.0)
    if name == "every":
        return one(int, _period)
    if name == "together":
        return one(str, _grouping)
    if name == "format":
        return one(Literal[tuple(FORMATS)], default=default)
    if name == "allocation":
        return one(Literal[tuple(_ALLOCATIONS)], _ALLOCATIONS.__getitem__, default=default.__name__)
    if name == "rank":
        return one(None, lambda value: _function(name, _RANKS, value))
    if name == "compress":
        return one(None)
    if name == "penalty":
        return one(None, lambda value: _function(name, PENALTIES, value))
    if len(kinds) == 1 and _is_settings(kinds[0]):
        return one(None, lambda value: _settings(name, kinds[0], value))
    if name in _NUMBERS:
        return one(float)
    choices = [kind for kind in kinds if typing.get_origin(kind) is Literal]
    if choices:
        return one(choices[0])
    return one(hint) if _is_plain(kinds) else None


def _value(option: Option, value: Any) -> Any:
    if option.kind is None:
        return value
    read: Any = read_value(option.name, option.kind, value)
    for number in read if isinstance(read, tuple) else (read,):
        check_number(option.name, number)
    return read


def _check_sparsity(values: Mapping[str, Any]) -> None:
    sparsity, pattern = values.get("sparsity"), values.get("pattern")
    if sparsity is None:
        return
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"`sparsity` must be in [0, 1], got {sparsity}.")
    if pattern is not None and sparsity > (allowed := parsed_pattern(pattern).allowed) + 1e-6:
        raise ValueError(f"`pattern` {pattern} allows a `sparsity` of at most {allowed:g}, got {sparsity:g}.")


def _ramp() -> _Keyword:
    """A schedule of sparsities: cubic from 0, within a part of the training."""
    texts = {
        "sparsity": (NEEDED, "share of zeros at the end, in [0, 1]."),
        "begin": (0.0, "share of the training steps at which pruning begins."),
        "end": (0.5, "share of the training steps at which the final sparsity is reached."),
    }
    options = tuple(Option(name=n, kind=float, default=value, help=text) for n, (value, text) in texts.items())

    def build(given: dict[str, Any]) -> OverTraining:
        begin, end = given.get("begin", 0.0), given.get("end", 0.5)
        if not 0.0 <= begin < end <= 1.0:
            raise ValueError(f"`begin` and `end` must be 0 <= begin < end <= 1, got {begin} and {end}.")

        def at(steps: int) -> Schedule:
            # The end is at least one step away, and never behind the last step: what is asked for is always reached.
            last = max(round(end * steps), 1)
            return cubic(0.0, given["sparsity"], begin=min(round(begin * steps), last - 1), end=last)

        return OverTraining(at)

    return _Keyword(options, build)


def _share_of_training(name: str) -> Callable[[float], OverTraining]:
    def build(share: float) -> OverTraining:
        _check_share(name, share)
        return OverTraining(lambda steps: max(round(share * steps), 1) if share and steps else 0)

    return build


def _period(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"`every` must be at least 1, got {steps}.")
    return steps


def _rise(share: float) -> OverTraining:
    _check_share("warm_up", share)

    def at(steps: int) -> Schedule:
        length = max(round(share * steps), 1)
        rise = optax.schedules.linear_schedule(0.0, 1.0, length)
        return (lambda step: jnp.asarray(rise(step), jnp.float32)) if share else constant(1.0)

    return OverTraining(at)


def _check_share(name: str, share: float) -> None:
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"`{name}` is a share of the training and must be in [0, 1], got {share}.")


def _grouping(pattern: str) -> Callable[[str], Any]:
    """Paths belong together in which the groups of a regular expression match the same."""
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as err:
        raise ValueError(f"`together` {pattern!r} is not a regular expression: {err}.") from err
    if not compiled.groups:
        raise ValueError(f"`together` {pattern!r} needs a group, such as 'layer/([0-9]+)/'.")

    def key(path: str) -> Any:
        match = compiled.search(path)
        return path if match is None else match.groups()

    return key


def _function(name: str, functions: Mapping[str, Callable[..., Any]], value: Any) -> Any:
    """A function by its name with its options; a whole number stands for itself where it is a rank."""
    if name == "rank" and isinstance(value, int) and not isinstance(value, bool):
        check_number(name, value)
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
        return value
    table: dict[str, Any] = value if isinstance(value, dict) else {}
    rule = table.get("rule")
    if not isinstance(rule, str) or rule not in functions:
        raise ValueError(
            f"`{name}` must be a table with `rule` = {' or '.join(map(repr, functions))} and its options"
            f"{', or a whole number' if name == 'rank' else ''}, found {value!r}."
        )
    given = _inner(name, functions[rule], {key: entry for key, entry in table.items() if key != "rule"})
    if any(isinstance(entry, OverTraining) for entry in given.values()):
        return OverTraining(lambda steps: functions[rule](**at_steps(given, steps)))
    return functions[rule](**given)


def _settings(name: str, cls: Any, value: Any) -> Any:
    if value is False:
        return None
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must be a table of options, or false, found {value!r}.")
    return cls(**_inner(name, cls, value))


def _inner(name: str, function: Any, table: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return read_options(function, table)
    except (ValueError, TypeError) as err:
        raise ValueError(f"`{name}`: {err}") from err


def _members(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint alone."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _is_plain(kinds: list[Any]) -> bool:
    """Whether TOML can say every value of these types."""
    if len(kinds) == 1 and typing.get_origin(kinds[0]) is tuple:
        return all(kind in (int, float) for kind in typing.get_args(kinds[0]))
    return bool(kinds) and all(kind in (bool, int, float, str) for kind in kinds)


def _is_settings(kind: Any) -> bool:
    """Whether it is a class of settings: a dataclass or a named tuple, whose fields are options."""
    fields = isinstance(kind, type) and (dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"))
    return fields and bool(_keywords(kind))


def argument_texts(function: Any) -> dict[str, str]:
    """What the docstring says of each argument or attribute."""
    section = re.search(r"^(?:Args|Attributes):\n((?: {4}.*\n?|\n)+)", inspect.getdoc(function) or "", re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section.group(1), re.MULTILINE) if section else ()
    return {name: " ".join(text.split()) for name, text in entries}
