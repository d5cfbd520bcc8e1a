"""Gradients of a loss, and the diagonal of the empirical Fisher information."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.meshes import replicated_beside
from jaxcompress._src.tree.checks import all_finite
from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.tree.partition import combine, partition_trainable
from jaxcompress._src.types import Params

Loss = Callable[[Params, Any], jax.Array]
"""`(params, batch) -> scalar`."""


def gradients(loss: Loss, params: Params, batches: Iterable[Any]) -> Params:
    """The mean over batches of dL/dw, in float32.

    Args:
        loss: `(params, batch) -> scalar`.
        params: float leaves are differentiated; codes of compressed leaves are not.
        batches: streamed; each is used once, and counts the same.

    Returns:
        A partial tree, `Unselected` where there is no float (as `tree.partition_trainable` leaves it).

    Raises:
        ValueError: no batches; a gradient that holds NaN or Inf; names the leaf.

    Example:
        >>> batches = [jnp.array([1.0, 2.0]), jnp.array([3.0, 0.0])]
        >>> gradients(lambda p, x: jnp.sum(p["w"] * x), {"w": jnp.ones(2)}, batches)
        {'w': Array([2., 1.], dtype=float32)}
    """
    return _mean(loss, params, batches, _gradient)


def fisher(loss: Loss, params: Params, batches: Iterable[Any], *, per_example: bool = True) -> Params:
    """The diagonal of the empirical Fisher information: the mean of squared gradients, in float32.

    per_example: mean over all examples i of (dL_i/dw)². Otherwise: mean over batches of (dL/dw)², with L the loss of a
    batch, which is what gradient accumulation sees: cheaper, and smaller by up to the batch size.

    Args:
        loss: `(params, batch) -> scalar`; per example it is given batches of one, the leading axis kept.
        params: as for `gradients`.
        batches: streamed; trees of arrays; per example, all of them have the same leading axis.
        per_example: which of the two.

    Returns:
        A partial tree, at least 0.

    Raises:
        ValueError: as for `gradients`; per example, arrays of a batch without a common leading axis.

    Example:
        >>> batch = jnp.array([[1.0, 2.0], [3.0, 0.0]])
        >>> def loss(params, x):
        ...     return jnp.mean(x @ params["w"])
        >>> fisher(loss, {"w": jnp.ones((2, 1))}, [batch])["w"].tolist()
        [[5.0], [2.0]]
        >>> fisher(loss, {"w": jnp.ones((2, 1))}, [batch], per_example=False)["w"].tolist()
        [[4.0], [1.0]]
    """
    return _mean(loss, params, batches, _squares_by_example if per_example else _squares)


_Evidence = Callable[[Loss, Params, Any], tuple[Params, Any]]
"""`(loss, floats, batch) -> (sum over its examples, number of them)`."""


def _mean(loss: Loss, params: Params, batches: Iterable[Any], evidence: _Evidence) -> Params:
    floats, rest = partition_trainable(params)

    def add(total: Params, count: Any, floats: Params, batch: Any) -> tuple[Params, Any]:
        more, number = evidence(lambda part, batch: loss(combine(part, rest), batch), floats, batch)
        return jax.tree.map(jnp.add, total, more), count + number

    step = jax.jit(add, donate_argnums=(0, 1))
    total = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), floats)
    count = jnp.zeros((), jnp.float32)
    for batch in batches:
        total, count = step(total, count, floats, batch)
    if not float(count):
        raise ValueError("`batches` is empty: gradients need at least one batch.")
    mean = jax.tree.map(lambda leaf: leaf / count, total)
    # Also the parts of compressed leaves that have gradients: the factors of low rank.
    for path, leaf in leaves_with_paths(mean, is_leaf=lambda _: False):
        if not all_finite(leaf):
            raise ValueError(f"The gradient of leaf {path!r} holds NaN or Inf.")
    return mean


def _gradient(loss: Loss, floats: Params, batch: Any) -> tuple[Params, Any]:
    gradient = jax.grad(loss)(floats, batch)
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradient), 1


def _squares(loss: Loss, floats: Params, batch: Any) -> tuple[Params, Any]:
    gradient, number = _gradient(loss, floats, batch)
    return jax.tree.map(jnp.square, gradient), number


def _squares_by_example(loss: Loss, floats: Params, batch: Any) -> tuple[Params, Any]:
    sizes = {leaf.shape[:1] for leaf in map(jnp.asarray, jax.tree.leaves(batch))}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(f"The arrays of a batch need one common leading axis, got {sorted(sizes)}.")
    ((size,),) = sizes

    # One after another: a gradient for each example at once would take that many copies of the params.
    def step(total: Params, example: Any) -> tuple[Params, None]:
        one = jax.tree.map(lambda leaf: leaf[None], example)
        return jax.tree.map(jnp.add, total, _squares(loss, floats, one)[0]), None

    start = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), floats)
    # A scan cannot run over an axis that an Explicit mesh cuts.
    return jax.lax.scan(step, start, replicated_beside(batch, batch))[0], size
