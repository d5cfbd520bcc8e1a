"""Exponential moving averages of what is trained.

With decay d, after n steps e_n = (1 - d) / (1 - d^n) Σ_i d^(n - i) p_i: a mean of p_1 ... p_n whose weights sum to 1.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress._src.distillation.train_state import TrainState, copy_of
from jaxcompress._src.tree.maps import flatten_like
from jaxcompress._src.tree.unselected import is_unselected
from jaxcompress._src.types import Params, TransformState, exportable


@exportable
class Averages(NamedTuple):
    """Averages over the steps of a training; all floats are float32 at least.

    Attributes:
        params: of the trained float leaves of the parameters; `Unselected` elsewhere.
        trainable: of the float leaves of `transform_state.trainable`; `Unselected` elsewhere.
        count: int32 scalar, number of steps averaged.
    """

    params: Params
    trainable: Any
    count: jax.Array


def averaged(state: TrainState) -> tuple[Params, TransformState]:
    """The parameters and the transform's state with the averages in place of what was trained last.

    `transform.finalize(*averaged(state))` is the student of the averaged weights. Frozen leaves, mutable collections
    and the fixed part of the transform's state are those of the last step.

    Args:
        state: of a training by `make_train_step(..., ema=...)`; before the first step, the averages are the initial
            values.

    Returns:
        `(params, transform_state)`, in the dtypes of `state`.

    Raises:
        ValueError: the training has no `ema`.

    Example:
        >>> import optax
        >>> from jaxcompress.distillation import make_train_step
        >>> apply = lambda params, batch, *, key, train: {"y": params["w"]}
        >>> loss = lambda student, teacher, batch: (student["y"], 1)
        >>> init_state, step = make_train_step(apply, None, optax.sgd(1.0), losses={"y": loss}, ema=0.5)
        >>> state = init_state({"w": jnp.zeros(())}, key=jax.random.key(0))
        >>> for _ in range(2):
        ...     state, _ = step(state, None, {})
        >>> round(float(averaged(state)[0]["w"]), 4)  # (0.5 · -1 + 1 · -2) / 1.5
        -1.6667
    """
    if not isinstance(state.ema, Averages):
        raise ValueError("The state has no averages: give `ema` to `make_train_step`.")
    trainable = _in_place(state.ema.trainable, state.transform_state.trainable)
    return _in_place(state.ema.params, state.params), state.transform_state._replace(trainable=trainable)


def first_averages(params: Params, trainable: Any) -> Averages:
    """The averages before the first step: copies of the initial values."""
    values = copy_of(jax.tree.map(_wide, (params, trainable)))
    return Averages(params=values[0], trainable=values[1], count=jnp.zeros((), jnp.int32))


def next_averages(averages: Averages, params: Params, trainable: Any, decay: float) -> Averages:
    """The averages with the values of one more step: e_n = e_(n-1) + (1 - d) / (1 - d^n) (p_n - e_(n-1))."""
    count = averages.count + 1
    # 1 - d^n in float32 would lose most digits of a d near 1.
    weight = (1 - decay) / -jnp.expm1(count * (math.log(decay) if decay else -math.inf))

    def step(average: jax.Array, leaf: jax.Array) -> jax.Array:
        return average + weight.astype(average.dtype) * (leaf.astype(average.dtype) - average)

    values = jax.tree.map(step, averages[:2], (params, trainable))
    return Averages(params=values[0], trainable=values[1], count=count)


def _wide(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _in_place(averages: Params, tree: Params) -> Params:
    """The averages in the dtypes of a tree, whose leaves stand where there are none."""
    entries, treedef = jax.tree.flatten(averages, is_leaf=is_unselected)
    leaves = flatten_like(treedef, tree)
    return treedef.unflatten(
        [x if is_unselected(entry) else entry.astype(x.dtype) for entry, x in zip(entries, leaves, strict=True)]
    )
