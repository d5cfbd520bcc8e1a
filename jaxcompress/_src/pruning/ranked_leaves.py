"""What transforms that hold masks have in common: which leaves, how they are ranked, how they are stored."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress._src.pruning.masks import apply_masks
from jaxcompress._src.pruning.patterns import Pattern, unstructured
from jaxcompress._src.pruning.ranking import Scope, check_sparsity, ranked_masks
from jaxcompress._src.pruning.store import store_masked
from jaxcompress._src.tree.maps import leaves_by_path, with_leaves
from jaxcompress._src.tree.unselected import map_selected, without_compressed
from jaxcompress._src.types import Params, Selector
from jaxcompress._src.weights.matrices import checked_weight
from jaxcompress._src.weights.selection import selected_layouts

Store = Literal["sparse", "dense"]

ScoreFn = Callable[[jax.Array], jax.Array]
"""`weights -> scores`; the lowest are pruned."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RankedLeaves:
    """Settings of a transform.

    Leaves that are compressed before the training begins stay as they are, through every function of a transform; those
    that an earlier stage compresses in the end are pruned in `finalize`.

    Attributes:
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`.
        scope: what is ranked together: "leaf", "global" (all leaves), or "row" (the inputs of one output unit).
        pattern: `unstructured()`, `n_of_m(2, 4)` (two of every four consecutive inputs are kept) or `block(32, 32)`.
        sparsities: None, or a partial tree that every sparsity is multiplied by, leaf by leaf.
        store: "sparse" arrays in the end, or "dense" ones with zeros.
    """

    select: Selector | None
    layouts: Params | None
    scope: Scope = "leaf"
    pattern: Pattern = dataclasses.field(default_factory=unstructured)
    sparsities: Params | None = None
    store: Store = "sparse"

    def __post_init__(self) -> None:
        """Checks the options."""
        if self.store not in ("sparse", "dense"):
            raise ValueError(f"`store` must be 'sparse' or 'dense', got {self.store!r}.")
        if self.sparsities is not None:
            check_sparsity(self.sparsities)

    def layouts_of(self, params: Params) -> Params:
        """The layouts of the leaves, `Unselected` elsewhere."""
        return selected_layouts(params, select=self.select, layouts=self.layouts)

    def weights(self, params: Params) -> Params:
        """The leaves to prune, where the training begins; concrete ones are checked.

        Raises:
            ValueError: every selected leaf is compressed already.
        """
        return self.weights_at(without_compressed(self.layouts_of(params), params), params)

    def weights_at(self, entries: Params, params: Params) -> Params:
        """The leaves as plain arrays where a partial tree, such as masks, has entries; concrete ones are checked."""
        return map_selected(lambda path, _, leaf: checked_weight(path, leaf), entries, params)

    def whole(self, params: Params) -> Params:
        """Masks that prune nothing."""
        # `ones_like`, not `ones`: a mask lies where its leaf does.
        return map_selected(lambda _, leaf: jnp.ones_like(leaf, bool), self.weights(params))

    def masks(self, leaves: Params, params: Params, share: ArrayLike, *, score: ScoreFn) -> Params:
        """Masks by rank of `score(leaf)`.

        Args:
            leaves: a partial tree: weights or scores.
            params: gives the layouts.
            share: sparsity, multiplied by `sparsities`.
            score: computed where it is compared.
        """
        sparsity = share if self.sparsities is None else map_selected(lambda _, final: final * share, self.sparsities)
        return ranked_masks(
            leaves, self.layouts_of(params), sparsity, scope=self.scope, pattern=self.pattern, score=score
        )

    def finalize(self, params: Params, masks: Params) -> Params:
        """The masked leaves as they are stored."""
        if self.store == "dense":
            return apply_masks(params, masks)
        stored = map_selected(
            lambda _, mask, leaf, layout: store_masked(leaf, mask, layout, self.pattern),
            masks,
            params,
            self.layouts_of(params),
        )
        return with_leaves(params, leaves_by_path(stored))
