"""Whether a checkpoint is of the run that wants to go on from it; otherwise, in what they differ."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxcompress._src.checkpoint.errors import CheckpointError

_SHOWN = 8


def check_config(where: str, stored: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Compares configs.

    Args:
        where: the checkpoint, in messages.
        stored: in the checkpoint.
        own: of this run.

    Raises:
        CheckpointError: they differ; lists the entries.
    """
    one, other = dict(_entries(stored)), dict(_entries(own))
    differences = [
        f"`{name}` is {_shown(one, name)} there, and {_shown(other, name)} here"
        for name in sorted(one.keys() | other.keys())
        if (name in one, one.get(name)) != (name in other, other.get(name))
    ]
    if differences:
        raise CheckpointError(
            f"Cannot go on from {where}: it is of a run with another config. {_listed(differences)}. Go on with the "
            "same config, or give another directory."
        )


def check_state(where: str, stored: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Compares the leaves and containers of states, by the JSON of their manifests.

    Raises:
        CheckpointError: they differ; lists the leaves.
    """
    one, other = _leaves(stored), _leaves(own)
    differences = [f"{name!r} is only there" for name in one if name not in other]
    differences += [f"{name!r} is only here" for name in other if name not in one]
    differences += [
        f"{name!r} is {_described(one[name])} there, and {_described(other[name])} here"
        for name in one
        if name in other and one[name] != other[name]
    ]
    if not differences and (found := _containers(stored["structure"])) != (wanted := _containers(own["structure"])):
        at = next(i for i, pair in enumerate(zip([*found, ""], [*wanted, ""], strict=False)) if pair[0] != pair[1])
        differences = [f"it has {' '.join(found[at : at + 3])}, where this state has {' '.join(wanted[at : at + 3])}"]
    if differences:
        raise CheckpointError(
            f"Cannot go on from {where}: its state has another structure, as another optimizer, transform or model "
            f"makes it. {_listed(differences)}."
        )


def _entries(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of everything that is no container, or empty."""
    items: Sequence[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    if not items:
        # The type tells 1 from 1.0 and True.
        yield name, (type(value).__name__, value)
    for key, item in items:
        yield from _entries(item, f"{name}.{key}" if name else str(key))


def _shown(entries: Mapping[str, tuple[str, Any]], name: str) -> str:
    return f"{entries[name][1]!r:.80}" if name in entries else "nothing"


def _leaves(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {"/".join(str(key[1]) for key in leaf["path"]): _without_names(leaf["value"]) for leaf in manifest["leaves"]}


def _without_names(value: Mapping[str, Any]) -> dict[str, Any]:
    """A stored value without the name of its array, which counts all leaves before it."""
    parts = {name: _without_names(part) for name, part in value.get("parts", {}).items()}
    return {name: item for name, item in value.items() if name != "array"} | {"parts": parts}


def _described(value: Mapping[str, Any]) -> str:
    name = f"{value['dtype']}{value['shape']}" if "shape" in value else value["kind"]
    kind = "" if value["kind"] in ("jax.Array", "prng_key") else f" ({value['kind']} {value.get('static', {})})"
    return f"{name}{kind:.200}"


def _containers(node: Mapping[str, Any]) -> list[str]:
    """Kinds of all containers in order, without their modules, which move from version to version."""
    if "leaf" in node:
        return ["leaf"]
    kind = node["kind"].rsplit(".", 1)[-1]
    return [kind, *(name for child in node["children"] for name in _containers(child[2]))]


def _listed(differences: Sequence[str]) -> str:
    rest = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    return "; ".join(differences[:_SHOWN]) + rest
