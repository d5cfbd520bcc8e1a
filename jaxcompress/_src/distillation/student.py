"""Which teacher layer a student layer learns from, and a student cut out of its teacher."""

import re
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

from jaxcompress._src.tree.maps import leaf_paths
from jaxcompress._src.types import Params


def layer_map(
    student_layers: int, teacher_layers: int, *, strategy: Literal["uniform", "last"] = "uniform"
) -> tuple[tuple[int, int], ...]:
    """Pairs of hidden states to compare; 0 is the output of the embeddings, i that of layer i.

    Args:
        student_layers: number of layers M >= 1.
        teacher_layers: number of layers N >= M.
        strategy: "uniform": i -> floor(i N / M) for i = 0 ... M, so that each student layer stands for a block of
            teacher layers, and the embeddings and the last layers meet. "last": i -> N - M + i for i = 1 ... M.

    Returns:
        (student, teacher) places in `hidden_states`, ascending.

    Raises:
        ValueError: not 1 <= M <= N, or an unknown strategy.

    Example:
        >>> layer_map(4, 12)
        ((0, 0), (1, 3), (2, 6), (3, 9), (4, 12))
        >>> layer_map(2, 12, strategy="last")
        ((1, 11), (2, 12))

    References:
        Jiao et al. 2020, "TinyBERT", section 4.1 (uniform); Sun et al. 2019, "Patient knowledge distillation" (last).
    """
    if not 1 <= student_layers <= teacher_layers:
        raise ValueError(f"A student has 1 to {teacher_layers} layers, as its teacher, got {student_layers}.")
    if strategy == "uniform":
        return tuple((i, i * teacher_layers // student_layers) for i in range(student_layers + 1))
    if strategy == "last":
        return tuple((i, teacher_layers - student_layers + i) for i in range(1, student_layers + 1))
    raise ValueError(f"`strategy` must be 'uniform' or 'last', got {strategy!r}.")


def select_layers(params: Params, pattern: str, layers: Sequence[int]) -> Params:
    r"""The tree with only some of its layers, renumbered from 0: a shallower student that starts as its teacher.

    Args:
        params: dicts (or other mappings), lists and tuples down to the layers. Nothing is copied.
        pattern: matched against full paths of leaves (`re.fullmatch`); its one group is the layer's number and lies
            within one key, such as `bert/encoder/layer/(\d+)/.*` or `blocks_(\d+)/.*`.
        layers: numbers of the teacher's layers to keep, in the student's order; a layer may come twice.

    Returns:
        A new tree; every set of layers that the pattern reaches is cut in the same way.

    Raises:
        ValueError: nothing matches, `layers` is empty or holds anything but numbers, or a layer does not exist.

    Example:
        >>> select_layers({"layer_0": {"w": "a"}, "layer_1": {"w": "b"}, "head": "c"}, r"layer_(\d+)/.*", [1])
        {'head': 'c', 'layer_0': {'w': 'b'}}
    """
    # Flags, one for each layer, would pass as the layers 0 and 1.
    if not len(layers) or not all(isinstance(layer, Integral) and not isinstance(layer, bool) for layer in layers):
        raise ValueError(f"`layers` must be numbers of layers, at least one, got {layers!r:.80}.")
    layer_keys = _layer_keys(params, re.compile(pattern))
    for stack, keys in layer_keys.items():
        missing = sorted(set(layers) - {int(number) for _, number, _ in keys.values()})
        if missing:
            raise ValueError(f"No layers {missing} at {stack or '.'!r}; it has the keys {list(keys)}.")
    return _rebuilt(params, "", layer_keys, layers)


def _layer_keys(params: Params, pattern: re.Pattern[str]) -> dict[str, dict[str, tuple[str, str, str]]]:
    """Path of each set of layers -> key of each layer -> the key's parts (before, number, after)."""
    if pattern.groups != 1:
        raise ValueError(f"The pattern needs one group, the layer's number, got {pattern.pattern!r}.")
    paths = leaf_paths(params)
    layer_keys: dict[str, dict[str, tuple[str, str, str]]] = {}
    for match in filter(None, map(pattern.fullmatch, paths)):
        path, start, end = match.string, match.start(1), match.end(1)
        first = path.rfind("/", 0, start) + 1
        last = path.find("/", end) if "/" in path[end:] else len(path)
        parts = (path[first:start], path[start:end], path[end:last])
        if not parts[1].isdigit():
            raise ValueError(f"The group of {pattern.pattern!r} must be a number, got {parts[1]!r} in {path!r}.")
        layer_keys.setdefault(path[:first].removesuffix("/"), {})[path[first:last]] = parts
    if not layer_keys:
        raise ValueError(f"{pattern.pattern!r} matches no leaf. The leaves are:" + "".join(f"\n  {p}" for p in paths))
    return layer_keys


def _rebuilt(
    node: Any, path: str, layer_keys: dict[str, dict[str, tuple[str, str, str]]], layers: Sequence[int]
) -> Any:
    if not any(stack == path or stack.startswith(path and f"{path}/") for stack in layer_keys):
        return node
    if isinstance(node, Mapping):
        entries = dict(node)
    elif type(node) in (list, tuple):
        entries = dict(enumerate(node))
    else:
        raise ValueError(f"Layers are cut out of mappings, lists and tuples; there is a {type(node)} at {path!r}.")
    entries = {
        key: _rebuilt(child, f"{path}/{key}".removeprefix("/"), layer_keys, layers) for key, child in entries.items()
    }
    if path in layer_keys:
        entries = _renumbered(entries, layer_keys[path], layers, path)
    rebuild: Any = type(node)
    return rebuild(entries) if isinstance(node, Mapping) else rebuild(entries[i] for i in range(len(entries)))


def _renumbered(
    entries: dict[Any, Any], keys: dict[str, tuple[str, str, str]], layers: Sequence[int], path: str
) -> dict[Any, Any]:
    by_number = {int(number): name for name, (_, number, _) in keys.items()}
    by_name = {str(key): key for key in entries}
    renumbered = {key: child for key, child in entries.items() if str(key) not in keys}
    for new, old in enumerate(layers):
        name = by_number[old]
        key = by_name[name]
        before, _, after = keys[name]
        renamed = new if isinstance(key, int) else f"{before}{new}{after}"
        if renamed in renumbered:
            raise ValueError(f"Layer {old} would become {renamed!r} at {path or '.'!r}, which exists beside them.")
        renumbered[renamed] = entries[key]
    return renumbered
