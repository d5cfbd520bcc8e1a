"""Readable names of leaves."""

from typing import Any

from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey


def path_string(keys: tuple[Any, ...]) -> str:
    """The keys of a leaf, joined by `/`; the root leaf is called `.`.

    The `.value` that NNX states put behind every variable is left out, so that the same layer has the same name in a
    dict and in a state.

    Args:
        keys: key entries, as `jax.tree_util.tree_flatten_with_path` gives them.

    Returns:
        The path, such as `encoder/layer/0/query/kernel`.

    Example:
        >>> from jax.tree_util import DictKey, SequenceKey
        >>> path_string((DictKey("encoder"), SequenceKey(0), DictKey("kernel")))
        'encoder/0/kernel'
    """
    if len(keys) >= 2 and keys[-1] == GetAttrKey("value") and isinstance(keys[-2], DictKey):
        keys = keys[:-1]
    return "/".join(_name(key) for key in keys) or "."


def entry_name(path: str, *index: int) -> str:
    """The name of one entry of a stacked leaf; without an index, of the leaf.

    Example:
        >>> entry_name("layers/kernel", 3), entry_name("experts", 0, 2), entry_name("kernel")
        ('layers/kernel[3]', 'experts[0,2]', 'kernel')
    """
    return f"{path}[{','.join(map(str, index))}]" if index else path


def _name(key: Any) -> str:
    if isinstance(key, DictKey | FlattenedIndexKey):
        return str(key.key)
    if isinstance(key, SequenceKey):
        return str(key.idx)
    return str(key.name) if isinstance(key, GetAttrKey) else str(key)
