"""How many weights a sparsity means, and what becomes of ties: ours, and those of reference implementations."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress._src.pruning.patterns import Pattern, Unstructured
from jaxcompress._src.pruning.ranking import Drops, Scope, group_axes, is_tree, round_half_even
from jaxcompress._src.trace.layout import LeafLayout
from jaxcompress._src.tree.checks import is_traced
from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.tree.unselected import map_selected
from jaxcompress._src.types import Params

CountingRule = Literal["exact", "jaxpruner", "sparsegpt", "tfmot"]


def check_rule(counting: CountingRule, sparsity: ArrayLike | Params, pattern: Pattern) -> None:
    """Raises for an unknown rule, and where a reference rule does not apply."""
    if counting not in _DROPS:
        raise ValueError(f"`counting` must be one of {', '.join(map(repr, _DROPS))}, got {counting!r}.")
    if counting == "exact":
        return
    shares = [share for _, share in leaves_with_paths(sparsity)] if is_tree(sparsity) else [sparsity]
    if any(is_traced(share) for share in shares):
        raise ValueError(f"`counting={counting!r}` needs a concrete sparsity.")
    if not isinstance(pattern, Unstructured):
        raise ValueError(f"`counting={counting!r}` goes with the unstructured pattern only, got {pattern}.")


def drops(counting: CountingRule) -> Drops:
    """The rule for the count."""
    return _DROPS[counting]


def break_ties(scores: Params, masks: Params, layouts: Params, *, counting: CountingRule, scope: Scope) -> Params:
    """Masks in which all ties with the last dropped ("sparsegpt") or the last kept ("tfmot") share its fate."""
    if counting not in ("sparsegpt", "tfmot"):
        return masks
    flat_scores = [score.astype(jnp.float32) for _, score in leaves_with_paths(scores)]
    flat_masks = [mask for _, mask in leaves_with_paths(masks)]
    flat_layouts = [
        layout for _, layout in leaves_with_paths(map_selected(lambda _, s, layout: layout, scores, layouts))
    ]
    limits = _limits(flat_scores, flat_masks, flat_layouts, counting, scope)
    pairs = zip(flat_scores, limits, strict=True)
    new_masks = iter([score > limit if counting == "sparsegpt" else score >= limit for score, limit in pairs])
    return map_selected(lambda *_: next(new_masks), masks)


def _limits(
    scores: list[jax.Array], masks: list[jax.Array], layouts: list[LeafLayout], counting: CountingRule, scope: Scope
) -> list[Any]:
    """The largest dropped score of every group, or the smallest kept one."""
    axes = group_axes([score.shape for score in scores], layouts, scope)
    if counting == "sparsegpt":
        marked = [jnp.where(mask, -jnp.inf, score) for score, mask in zip(scores, masks, strict=True)]
        reduce, blank = jnp.max, -jnp.inf
    else:
        marked = [jnp.where(mask, score, jnp.inf) for score, mask in zip(scores, masks, strict=True)]
        reduce, blank = jnp.min, jnp.inf
    if axes is None:
        return [reduce(jnp.stack([reduce(leaf, initial=blank) for leaf in marked]))] * len(scores)
    return [reduce(leaf, axis=group, keepdims=True, initial=blank) for leaf, group in zip(marked, axes, strict=True)]


def _keep_one(size: int, share: float) -> int:
    return size - max(min(size, 1), round((1 - share) * size))


def _one_more(size: int, share: float) -> int:
    return min(size, int(size * share) + 1)


_DROPS: dict[str, Drops] = {
    "exact": round_half_even,
    "jaxpruner": _keep_one,
    "sparsegpt": _one_more,
    "tfmot": _keep_one,
}
