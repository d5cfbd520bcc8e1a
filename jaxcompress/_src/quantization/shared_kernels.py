"""Kernels that several matmuls share."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from jaxcompress._src.calibration.moments import Moments, moments
from jaxcompress._src.calibration.pause import side_by_side
from jaxcompress._src.calibration.site import LeafPart
from jaxcompress._src.tree.maps import leaves_by_path
from jaxcompress._src.types import Params


def pooled_moments(
    apply: Callable[..., Any],
    trees: tuple[Params, Params],
    kernel: LeafPart,
    batches: Sequence[tuple[Any, ...]],
    rows: Sequence[Any],
) -> Moments:
    """The moments of all matmuls of one kernel together.

    The targets are those of the products: the biases, which may differ from matmul to matmul, are the same in both
    models.

    Args:
        apply: `(params, *inputs) -> outputs`.
        trees: the parameters of the dense model, and of the one so far.
        kernel: the leaf, or the entry of a stack.
        batches: tuples of inputs.
        rows: the weights of the rows of each batch, or None.
    """
    run = side_by_side(apply, [kernel.path], trees, batches, repeated="each")
    leaves = [leaves_by_path(tree) for tree in trees]
    found: list[Moments] = []
    replies: Any = None
    while True:
        try:
            pairs = run.send(replies)
        except StopIteration:
            return _sum(found)
        site = pairs[0][0]
        weights = [site.kernel.matrix(jnp.asarray(tree[site.kernel.path])) for tree in leaves]
        nothing = jnp.zeros(weights[0].shape[1], weights[0].dtype)
        biases = [
            nothing if site.bias is None else site.bias.matrix(jnp.asarray(tree[site.bias.path]))[0] for tree in leaves
        ]
        if site.kernel == kernel:
            dense = weights[0].astype(jnp.float32)
            found.append(moments(pairs, dense, nothing.astype(jnp.float32), rows))
        replies = (weights[0], biases[0]), (weights[1], biases[1])


def _sum(parts: Sequence[Moments]) -> Moments:
    names = [field.name for field in dataclasses.fields(Moments)]
    total: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in names}
    return Moments(**total)
