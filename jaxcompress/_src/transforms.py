"""Putting transforms in a row, and differentiating through them."""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.tree.maps import map_with_path
from jaxcompress._src.tree.partition import combine, partition_trainable
from jaxcompress._src.tree.unselected import is_unselected
from jaxcompress._src.types import Params, Selector, Transform, TransformState, is_compressed

PullBack = Callable[[Params], tuple[Any, Params, Any]]
"""`grads_of_effective -> (stage_grads, grads_params, grads_trainable)`."""


def identity() -> Transform:
    """The transform that does nothing.

    Example:
        >>> identity().apply({"w": 1.0}, TransformState((), ()))
        {'w': 1.0}
    """
    return _IDENTITY


def chain(*transforms: Transform) -> Transform:
    """Several transforms, one after another: `chain(a, b).apply(p) = b.apply(a.apply(p))`.

    The order matters: prune before quantizing. Where a stage takes `params` for reading (`init`, `penalty`, `update`),
    it gets its deterministic input: what the stages before it return at `key=None`, in `update` with their new states.
    `project` and `finalize` hand `params` on from stage to stage. Keys are split, one for each stage; penalties are
    added; a weight is fresh, and a leaf frozen, when any stage says so.

    Args:
        *transforms: in the order of application. Chains among them are taken apart; none at all gives `identity()`.

    Returns:
        A transform whose state holds one tuple entry per stage, in `trainable` and in `fixed`, and whose `update` takes
        as `grads` one tree per stage (see `pullback`).

    Example:
        >>> import jax
        >>> both = chain(identity(), chain(identity()))
        >>> len(both.stages), both.init({"w": jax.numpy.ones(2)}, key=jax.random.key(0))
        (2, TransformState(trainable=((), ()), fixed=((), ())))
    """
    if not transforms:
        return identity()
    stages = tuple(stage for transform in transforms for stage in transform.stages or (transform,))
    return Transform(
        init=_chain_init(stages),
        apply=_chain_apply(stages),
        penalty=_chain_penalty(stages),
        update=_chain_update(stages),
        project=_chain_project(stages),
        finalize=_chain_finalize(stages),
        stages=stages,
        frozen=_chain_frozen(stages),
    )


def pullback(
    transform: Transform, params: Params, state: TransformState, *, key: jax.Array | None
) -> tuple[Params, PullBack]:
    """Applies a transform, and returns the function that carries gradients back through it, stage by stage.

    Args:
        transform: a chain or a single one.
        params: raw parameters.
        state: of `transform`.
        key: typed, for `transform.apply`; None for the deterministic form.

    Returns:
        `(effective, pull)`: `effective` is `transform.apply(params, state, key=key)`. `pull(grads)` takes the gradient
        with respect to the float leaves of `effective` and returns `(stage_grads, grads_params, grads_trainable)`. The
        first is what `transform.update` takes: the gradient with respect to what `apply` returned, for a chain one tree
        per stage. In all gradients `Unselected` stands for what is no float, as `partition_trainable` leaves it.

    Example:
        >>> effective, pull = pullback(identity(), {"w": jnp.ones(2)}, TransformState((), ()), key=None)
        >>> pull({"w": jnp.array([3.0, 4.0])})[1]
        {'w': Array([3., 4.], dtype=float32)}
    """
    is_chain = bool(transform.stages)
    stages = transform.stages or (transform,)
    states = _split_state(state, len(stages)) if is_chain else [state]
    keys = _split_key(key, len(stages)) if is_chain else [key]
    pulls = []
    for stage, stage_state, stage_key in zip(stages, states, keys, strict=True):
        params, pull_stage = _stage_pullback(stage, params, stage_state, stage_key)
        pulls.append(pull_stage)

    def pull(grads: Params) -> tuple[Any, Params, Any]:
        of_stages, of_trainable = [], []
        for pull_stage in reversed(pulls):
            of_stages.append(grads)
            grads, grads_trainable = pull_stage(grads)
            of_trainable.append(grads_trainable)
        if not is_chain:
            return of_stages[0], grads, of_trainable[0]
        return tuple(reversed(of_stages)), grads, tuple(reversed(of_trainable))

    return params, pull


def trained_leaves(transform: Transform, select: Selector | None) -> Selector | None:
    """The leaves of a selector (by default all) that a transform has not frozen.

    Example:
        >>> some = identity()._replace(frozen=lambda params: {"a": True, "b": False})
        >>> (trained_leaves(some, None) or identity)({"a": 1, "b": 2})
        {'a': False, 'b': True}
    """
    frozen = transform.frozen
    if frozen is None:
        return select

    def marks(params: Params) -> Params:
        selected = map_with_path(lambda *_: True, params) if select is None else select(params)
        return map_with_path(
            lambda _, _leaf, mark, frozen_mark: bool(mark) and not frozen_mark, params, selected, frozen(params)
        )

    return marks


def checked_init(transform: Transform, params: Params, *, key: jax.Array | None, statistics: Any) -> TransformState:
    """`transform.init(...)`.

    Raises:
        TypeError: it returns something else than a `TransformState`. Names the function.
    """
    state = transform.init(params, key=key, statistics=statistics)
    if not isinstance(state, TransformState):
        raise TypeError(f"`init` returns a `TransformState`; {_name(transform.init)} returned {type(state).__name__}.")
    return state


def checked_update(
    transform: Transform, grads: Any, state: TransformState, params: Params, *, key: jax.Array | None, loss: Any
) -> tuple[TransformState, Any]:
    """`transform.update(...)`.

    Raises:
        TypeError: it returns something else than `(state, fresh)`, or a state of another structure. Names the function.
    """
    result = transform.update(grads, state, params, key=key, loss=loss)
    # A bare state is a pair, too: it must not be taken apart.
    if isinstance(result, TransformState) or not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            f"`update` returns `(state, fresh)`, with `None` as `fresh` where no weights start anew; "
            f"{_name(transform.update)} returned {type(result).__name__}."
        )
    _check_state("update", transform.update, result[0], state)
    return result


def checked_project(transform: Transform, params: Params, state: TransformState) -> tuple[Params, TransformState]:
    """`transform.project(...)`.

    Raises:
        TypeError: it returns something else than `(params, state)`, or a state of another structure. Names the
            function.
    """
    result = transform.project(params, state)
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            f"`project` returns `(params, state)`; {_name(transform.project)} returned {type(result).__name__}."
        )
    _check_state("project", transform.project, result[1], state)
    return result


def _check_state(name: str, function: Callable[..., Any], state: Any, before: TransformState) -> None:
    if jax.tree.structure(state) != jax.tree.structure(before):
        old, new = (
            {jax.tree_util.keystr(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)}
            for tree in (before, state)
        )
        raise TypeError(
            f"`{name}` keeps the structure of the state; {_name(function)} returned {type(state).__name__}: new leaves "
            f"{sorted(new - old)}, missing leaves {sorted(old - new)}."
        )


def _name(function: Any) -> str:
    while isinstance(function, partial):
        function = function.func
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _stage_pullback(
    stage: Transform, params: Params, state: TransformState, key: jax.Array | None
) -> tuple[Params, Callable[[Params], tuple[Params, Params]]]:
    floats, rest = partition_trainable(params)
    trainable, not_trainable = partition_trainable(state.trainable)

    def forward(floats: Params, trainable: Any) -> tuple[Params, Params]:
        inner = TransformState(combine(trainable, not_trainable), state.fixed)
        return partition_trainable(stage.apply(combine(floats, rest), inner, key=key))

    outputs, pull, others = jax.vjp(forward, floats, trainable, has_aux=True)
    return combine(outputs, others), pull


def _chain_init(stages: tuple[Transform, ...]) -> Callable[..., TransformState]:
    def init(params: Params, *, key: jax.Array, statistics: Any = None) -> TransformState:
        states = []
        for stage, stage_key in zip(stages, _split_key(key, len(stages)), strict=True):
            states.append(checked_init(stage, params, key=stage_key, statistics=statistics))
            params = stage.apply(params, states[-1], key=None)
        return _join_states(states)

    return init


def _chain_apply(stages: tuple[Transform, ...]) -> Callable[..., Params]:
    def apply(params: Params, state: TransformState, *, key: jax.Array | None = None) -> Params:
        keys = _split_key(key, len(stages))
        for stage, stage_state, stage_key in zip(stages, _split_state(state, len(stages)), keys, strict=True):
            params = stage.apply(params, stage_state, key=stage_key)
        return params

    return apply


def _chain_penalty(stages: tuple[Transform, ...]) -> Callable[..., Any]:
    def penalty(state: TransformState, params: Params, *, loss: Any) -> Any:
        total = jnp.zeros((), jnp.float32)
        for stage, stage_state in zip(stages, _split_state(state, len(stages)), strict=True):
            total = total + stage.penalty(stage_state, params, loss=loss)
            params = stage.apply(params, stage_state, key=None)
        return total

    return penalty


def _chain_update(stages: tuple[Transform, ...]) -> Callable[..., tuple[TransformState, Any]]:
    def update(
        grads: tuple[Params, ...], state: TransformState, params: Params, *, key: jax.Array, loss: Any
    ) -> tuple[TransformState, Any]:
        states, marks = [], []
        old, keys = _split_state(state, len(stages)), _split_key(key, len(stages))
        for stage, stage_grads, stage_state, stage_key in zip(stages, grads, old, keys, strict=True):
            new, fresh = checked_update(stage, stage_grads, stage_state, params, key=stage_key, loss=loss)
            states.append(new)
            marks.append(fresh)
            params = stage.apply(params, new, key=None)
        return _join_states(states), reduce(_either_fresh, marks)

    return update


def _chain_project(stages: tuple[Transform, ...]) -> Callable[..., tuple[Params, TransformState]]:
    def project(params: Params, state: TransformState) -> tuple[Params, TransformState]:
        states = []
        for stage, stage_state in zip(stages, _split_state(state, len(stages)), strict=True):
            params, projected = checked_project(stage, params, stage_state)
            states.append(projected)
        return params, _join_states(states)

    return project


def _chain_finalize(stages: tuple[Transform, ...]) -> Callable[..., Params]:
    def finalize(params: Params, state: TransformState) -> Params:
        for stage, stage_state in zip(stages, _split_state(state, len(stages)), strict=True):
            params = stage.finalize(params, stage_state)
        return params

    return finalize


def _chain_frozen(stages: tuple[Transform, ...]) -> Selector | None:
    selectors = [stage.frozen for stage in stages if stage.frozen is not None]

    def frozen(params: Params) -> Params:
        return map_with_path(lambda _path, _leaf, *marks: any(marks), params, *(select(params) for select in selectors))

    return frozen if selectors else None


def _join_states(states: list[TransformState]) -> TransformState:
    return TransformState(tuple(s.trainable for s in states), tuple(s.fixed for s in states))


def _split_state(state: TransformState, count: int) -> list[TransformState]:
    if len(state.trainable) != count or len(state.fixed) != count:
        found = (len(state.trainable), len(state.fixed))
        raise ValueError(f"A chain of {count} stages needs {count} states, got {found} (trainable, fixed).")
    return [TransformState(*parts) for parts in zip(state.trainable, state.fixed, strict=True)]


def _split_key(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    return [None] * count if key is None else list(jax.random.split(key, count))


def _either_fresh(first: Any, second: Any) -> Any:
    if first is None or second is None:
        return second if first is None else first

    def either(_: str, x: Any, y: Any) -> Any:
        if is_unselected(x) or is_unselected(y):
            return y if is_unselected(x) else x
        return x | y

    return map_with_path(either, first, second, is_leaf=lambda leaf: is_unselected(leaf) or is_compressed(leaf))


_IDENTITY = Transform(
    init=lambda params, *, key, statistics=None: TransformState((), ()),
    apply=lambda params, state, *, key=None: params,
    penalty=lambda state, params, *, loss: jnp.zeros((), jnp.float32),
    update=lambda grads, state, params, *, key, loss: (state, None),
    project=lambda params, state: (params, state),
    finalize=lambda params, state: params,
)
