"""Which leaves to act on. A selector that matches nothing is an error that lists what exists."""

import re
from collections.abc import Callable
from typing import Any

import jax

from jaxcompress._src.tree.maps import leaves_with_paths, map_with_path
from jaxcompress._src.types import Params, Selector, is_compressed


def by_path(pattern: str) -> Selector:
    """Leaves whose whole path matches a regular expression.

    Args:
        pattern: matched against the full path (`re.fullmatch`), such as `.*/kernel`.

    Returns:
        The selector. It raises `ValueError`, listing the paths, when no array matches.

    Example:
        >>> import jax.numpy as jnp
        >>> by_path(r".*/kernel")({"dense": {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))}})
        {'dense': {'bias': False, 'kernel': True}}
    """
    compiled = re.compile(pattern)
    return _selector(lambda path, _: compiled.fullmatch(path) is not None, f"by_path({pattern!r})")


def by_ndim(*, min: int = 0, max: int | None = None) -> Selector:
    """Leaves with at least `min` and at most `max` axes.

    Example:
        >>> import jax.numpy as jnp
        >>> by_ndim(min=2)({"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))})
        {'bias': False, 'kernel': True}
    """
    return _selector(
        lambda _, leaf: min <= len(leaf.shape) and (max is None or len(leaf.shape) <= max),
        f"by_ndim(min={min}, max={max})",
    )


def all_of(*selectors: Selector) -> Selector:
    """Leaves that every one of `selectors` marks."""
    return _combined(all, selectors, "all_of")


def any_of(*selectors: Selector) -> Selector:
    """Leaves that at least one of `selectors` marks."""
    return _combined(any, selectors, "any_of")


def exclude(selector: Selector) -> Selector:
    """Array leaves that `selector` does not mark.

    Example:
        >>> import jax.numpy as jnp
        >>> exclude(by_path("head/.*"))({"body": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 2))}})
        {'body': {'kernel': True}, 'head': {'kernel': False}}
    """

    def select(params: Params) -> Params:
        marks = map_with_path(lambda _, leaf, mark: _is_array(leaf) and not mark, params, selector(params))
        return _nonempty(marks, params, "exclude(...)")

    return select


def _selector(predicate: Callable[[str, Any], bool], name: str) -> Selector:
    def select(params: Params) -> Params:
        marks = map_with_path(lambda path, leaf: _is_array(leaf) and predicate(path, leaf), params)
        return _nonempty(marks, params, name)

    return select


def _combined(rule: Callable[..., bool], selectors: tuple[Selector, ...], name: str) -> Selector:
    if not selectors:
        raise ValueError(f"`{name}` needs at least one selector.")

    def select(params: Params) -> Params:
        marks = map_with_path(lambda _path, _leaf, *marks: rule(marks), params, *(s(params) for s in selectors))
        return _nonempty(marks, params, f"{name}(...)")

    return select


def _nonempty(marks: Params, params: Params, name: str) -> Params:
    if not any(jax.tree.leaves(marks)):
        listed = "".join(
            f"\n  {path} {tuple(leaf.shape)}" for path, leaf in leaves_with_paths(params) if _is_array(leaf)
        )
        raise ValueError(f"The selector {name} matches no leaf. The array leaves are:{listed or ' none'}")
    return marks


def _is_array(leaf: Any) -> bool:
    return is_compressed(leaf) or (hasattr(leaf, "shape") and hasattr(leaf, "dtype"))
