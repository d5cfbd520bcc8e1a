"""Training thin factors beside frozen weights, plain or compressed.

Shape letters: D inputs, R outputs, k the rank.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcompress._src.arrays.low_rank import LowRankArray
from jaxcompress._src.lowrank.residual import CompressFn
from jaxcompress._src.meshes import transform_on_auto_axes
from jaxcompress._src.trace.layout import LeafLayout
from jaxcompress._src.transforms import identity
from jaxcompress._src.tree.maps import leaves_by_path, leaves_with_paths, map_with_path, with_leaves
from jaxcompress._src.tree.unselected import partial_tree
from jaxcompress._src.types import Params, Selector, Transform, TransformState, is_compressed
from jaxcompress._src.weights.selection import selected_layouts

Store = Literal["merged", "factors"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Setup:
    rank: int
    scale: float
    train: Selector | None
    store: Store | None
    requantize: CompressFn | None
    select: Selector | None
    layouts: Params | None


@transform_on_auto_axes
def lora(
    *,
    rank: int,
    alpha: float | None = None,
    train: Selector | None = None,
    store: Store | None = None,
    requantize: CompressFn | None = None,
    select: Selector | None = None,
    layouts: Params | None = None,
) -> Transform:
    """Freezes the weights W and trains two factors beside them: W' = W + (alpha / rank) A B.

    A (D, k) starts random, of variance 1 / D, and B (k, R) as 0, so that training starts at W; each entry of a stack
    has its own. W may be compressed (QLoRA): it is never made plain, and keeps its bits, scales included. `apply` gives
    a `LowRankArray` whose residual is W, so that a product is X W + (X A) B. A train step leaves everything but the
    factors alone (`Transform.frozen`), without moments; its `transform_optimizer` trains those.

    Weights that are 0 in W do not stay 0.

    Args:
        rank: k, at least 1.
        alpha: strength of the factors; by default `rank`, for a factor of 1.
        train: further leaves to train as they are, such as a new head.
        store: what `finalize` makes of a leaf. "merged": one plain array, W + (alpha / rank) A B. "factors": a
            `LowRankArray` with W as its residual. By default plain leaves are merged, and compressed ones keep factors,
            since merging would undo their compression.
        requantize: `(params, statistics, layouts) -> (params, info)`, such as `lambda p, s, at:
            quantization.quantize(p, spec, layouts=at)`: all leaves are merged, and this compresses them. It gets
            partial trees, and no statistics.
        select: which leaves get factors; by default every weight.
        layouts: from `trace.layouts`; by default kernels are (in..., out).

    Returns:
        The transform. `state.trainable` is {"left": path -> A, "right": path -> B}, float32, in the axes of the leaf,
        of size 1 where they do not vary, and the rank as the last axis; `state.fixed` is empty.

    Raises:
        ValueError: an option is out of range, or both `requantize` and `store`; from `init`: nothing is selected, a
            selected leaf holds no floats, or `train` has a leaf that gets factors; from `finalize`: `requantize`
            returned another structure, shape or dtype.

    Example:
        >>> transform = lora(rank=1, alpha=2.0)
        >>> params = {"kernel": jnp.zeros((2, 3))}
        >>> state = transform.init(params, key=jax.random.key(0))
        >>> {name: factors["kernel"].shape for name, factors in state.trainable.items()}
        {'left': (2, 1, 1), 'right': (1, 3, 1)}
        >>> trained = {name: {"kernel": jnp.ones(f["kernel"].shape)} for name, f in state.trainable.items()}
        >>> transform.finalize(params, state._replace(trainable=trained))["kernel"].tolist()
        [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]

    References:
        Hu et al. 2021, "LoRA: low-rank adaptation of large language models"; Dettmers et al. 2023, "QLoRA: efficient
        finetuning of quantized LLMs".
    """
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, got {rank}.")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"`alpha` must be positive, got {alpha}.")
    if store not in (None, "merged", "factors"):
        raise ValueError(f"`store` must be 'merged' or 'factors', got {store!r}.")
    if store is not None and requantize is not None:
        raise ValueError(f"`requantize` merges and compresses every leaf: leave out `store`, got {store!r}.")
    setup = _Setup(
        rank=rank,
        scale=1.0 if alpha is None else alpha / rank,
        train=train,
        store=store,
        requantize=requantize,
        select=select,
        layouts=layouts,
    )
    return identity()._replace(
        init=functools.partial(_init, setup),
        apply=functools.partial(_apply, setup),
        finalize=functools.partial(_finalize, setup),
        frozen=functools.partial(_frozen, setup),
    )


def _init(setup: _Setup, params: Params, *, key: jax.Array, statistics: Any = None) -> TransformState:
    del statistics
    layouts, leaves = _layouts(setup, params), leaves_by_path(params)
    if setup.train is not None:
        trained = {path for path, mark in leaves_with_paths(setup.train(params)) if mark}
        if both := sorted(trained & set(layouts)):
            raise ValueError(f"Leaf {both[0]!r} gets factors, so it is frozen, but `train` has it, too.")
    left, right = {}, {}
    for path, leaf_key in zip(sorted(layouts), jax.random.split(key, len(layouts)), strict=True):
        leaf, layout = leaves[path], layouts[path]
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"Leaf {path!r} holds {leaf.dtype}: only floats get factors; exclude it.")
        sizes = [
            [size if axis in (*layout.stack_axes, *along) else 1 for axis, size in enumerate(leaf.shape)]
            for along in (layout.input_axes, layout.output_axes)
        ]
        depth = max(math.prod(leaf.shape[axis] for axis in layout.input_axes), 1)
        left[path] = jax.random.normal(leaf_key, (*sizes[0], setup.rank), jnp.float32) / math.sqrt(depth)
        right[path] = jnp.zeros((*sizes[1], setup.rank), jnp.float32)
    return TransformState({"left": left, "right": right}, ())


def _apply(setup: _Setup, params: Params, state: TransformState, *, key: Any = None) -> Params:
    del key
    left, right = state.trainable["left"], state.trainable["right"]

    def beside(path: str, leaf: Any) -> Any:
        if path not in left:
            return leaf
        scaled = setup.scale * left[path]
        return LowRankArray(left=scaled, right=right[path], dtype=jnp.dtype(leaf.dtype), residual=leaf)

    return map_with_path(beside, params)


def _finalize(setup: _Setup, params: Params, state: TransformState) -> Params:
    known = state.trainable["left"]
    small = {path: leaf for path, leaf in leaves_with_paths(_apply(setup, params, state)) if path in known}
    stored = {
        path: leaf if _keeps_factors(setup, leaf.residual) else leaf.materialize() for path, leaf in small.items()
    }
    if setup.requantize is None:
        return with_leaves(params, stored)
    layouts = partial_tree(params, _layouts(setup, params))
    compressed, _ = setup.requantize(partial_tree(params, stored), partial_tree(params, {}), layouts)
    new = leaves_by_path(compressed)
    for path, leaf in stored.items():
        shown = "nothing" if path not in new else f"{new[path].dtype}{tuple(new[path].shape)}"
        if shown != f"{leaf.dtype}{tuple(leaf.shape)}":
            wanted = f"{leaf.dtype}{tuple(leaf.shape)}"
            raise ValueError(f"`requantize` returned {shown} for leaf {path!r}, expected {wanted}.")
    return with_leaves(params, {path: new[path] for path in stored})


def _keeps_factors(setup: _Setup, base: Any) -> bool:
    if setup.requantize is not None:
        return False
    return is_compressed(base) if setup.store is None else setup.store == "factors"


def _frozen(setup: _Setup, params: Params) -> Params:
    marks = map_with_path(lambda *_: False, params) if setup.train is None else setup.train(params)
    return map_with_path(lambda _, leaf, mark: not mark, params, marks)


def _layouts(setup: _Setup, params: Params) -> dict[str, LeafLayout]:
    return leaves_by_path(selected_layouts(params, select=setup.select, layouts=setup.layouts))
