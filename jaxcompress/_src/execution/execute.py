"""The interpreter: a model's jaxpr, evaluated with compressed leaves in place."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxcompress._src.arrays.protocol import can_unstack, why_no_share
from jaxcompress._src.execution.kernels.choice import Planned, checked_kernels, multiplier
from jaxcompress._src.execution.rules import RULES
from jaxcompress._src.execution.runs import boundaries, cut, sliced_runs
from jaxcompress._src.execution.values import Evaluation, Fallback, Note, Runs, Weight, ignore, plain, with_plain_weight
from jaxcompress._src.meshes import as_typed, explicit_mesh, on_auto_axes, varying, varying_axes
from jaxcompress._src.trace.traced import split_arrays, traced
from jaxcompress._src.trace.walk import CALLS, Body, as_body, bind, called_body, walk
from jaxcompress._src.tree.paths import path_string
from jaxcompress._src.types import is_compressed


def execute(apply: Callable[..., Any], *, kernels: Sequence[str] | None = None) -> Callable[..., Any]:
    """`apply`, able to take compressed arrays anywhere in its arguments.

    `apply` is traced on the logical shapes, and its jaxpr evaluated with the rules of the compressed arrays: matmuls
    and look-ups read the stored form, re-arrangements move it, whatever else needs the values gets the plain array
    (`fallbacks` lists those). The result is always that of `apply(materialize(...))`, up to the order of float sums.
    Equations without a compressed operand are bound again unchanged, with their own derivatives.

    Composable with `jit`, `grad` (of float leaves: see `tree.partition_trainable`), `vmap`, `scan` and sharding. Wrap
    it in `jax.jit` with the parameters as arguments: constants would be folded to floats.

    Args:
        apply: pure; arguments that are no arrays (flags, None) are static.
        kernels: names of implementations of products, to try in this order; where none applies, the array multiplies by
            itself. By default the fastest known one for each leaf, number of rows and processor: `execution.plan` shows
            which, why, and by what each differs. `()`: none.

    Returns:
        A function of the same arguments and outputs. Without compressed arguments it calls `apply` as it is.

    Raises:
        ValueError: there is no kernel of a name, or this machine lacks what it needs; in `jax.shard_map`, a leaf was
            cut into shares that are not whole (names it and the axis).

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress.arrays import QuantizedArray
        >>> codes, scale = jnp.array([[1], [-2]], "int8"), jnp.array([[0.5]])
        >>> kernel = QuantizedArray(data=codes, scale=scale, dtype=jnp.dtype("float32"))
        >>> execute(lambda params, x: x @ params["kernel"])({"kernel": kernel}, jnp.array([[1.0, 1.0]]))
        Array([[-0.5]], dtype=float32)
    """
    if kernels is not None:
        checked_kernels(kernels)
    return functools.wraps(apply)(functools.partial(run_compressed, apply, functools.partial(evaluation_with, kernels)))


def evaluation_with(
    kernels: Sequence[str] | None, *, note: Note = ignore, planned: Planned = lambda *_: None
) -> Evaluation:
    """What the interpreter needs, with these kernels; `note` and `planned` are told what happens."""
    return Evaluation(multiply=multiplier(kernels, planned), note=note)


def fallbacks(apply: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Fallback, ...]:
    """Where `execute(apply)(*args, **kwargs)` has to make plain arrays; found abstractly, nothing is computed.

    Args:
        apply: as for `execute`.
        *args: as for `apply`; arrays may be abstract.
        **kwargs: keywords of `apply`; arrays may be abstract.

    Returns:
        One entry for each use in the program text (the body of a scan counts once), in execution order.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress.arrays import QuantizedArray
        >>> codes, scale = jnp.ones((2, 3), "int8"), jnp.ones((1, 3))
        >>> params = {"w": QuantizedArray(data=codes, scale=scale, dtype=jnp.dtype("float32"))}
        >>> fallbacks(lambda p: jnp.sin(p["w"]), params)
        (Fallback(path='w', primitive='sin', shape=(2, 3), nbytes=24),)
    """
    # The parts of compressed arrays are arrays, too.
    arrays, static = split_arrays((args, kwargs), is_leaf=lambda _: False)
    noted: list[Fallback] = []

    def run(arrays: list[Any]) -> Any:
        full_args, full_kwargs = static.filled(arrays)
        return run_compressed(apply, lambda: evaluation_with((), note=noted.append), *full_args, **full_kwargs)

    jax.eval_shape(run, arrays)
    # JAX may trace the body of a loop more than once.
    return tuple(dict.fromkeys(noted))


def run_compressed(apply: Callable[..., Any], evaluation: Callable[[], Evaluation], *args: Any, **kwargs: Any) -> Any:
    """`apply` on compressed arguments; `evaluation` is asked for where there are any."""
    keyed, _ = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_compressed)
    if not any(is_compressed(leaf) for _, leaf in keyed):
        return apply(*args, **kwargs)
    tagged = [_tagged(*each) for each in keyed]
    model = traced(lambda tree: apply(*tree[0], **tree[1]), (args, kwargs), ())
    results = _interpret(as_body(model.closed), [tagged[number] for number in model.numbers], evaluation())
    return model.outputs.unflatten(results)


def _interpret(body: Body, values: Sequence[Any], evaluation: Evaluation) -> list[Any]:
    """Evaluates a body; its outputs are plain."""
    results = walk(body, values, functools.partial(_visit, evaluation=evaluation))
    return _plain(body.jaxpr.outvars, results, "output", evaluation)


def _visit(eqn: Any, values: list[Any], *, evaluation: Evaluation) -> Sequence[Any]:
    if not any(isinstance(value, Weight | Runs) for value in values):
        return bind(eqn, values)
    name = eqn.primitive.name
    if name == "concatenate" and eqn.params["dimension"] == 0:
        return [Runs.joined(values)]
    if name in _CONTROL:
        values = [Weight(value.array, value.path) if isinstance(value, Weight) else value for value in values]
        return _CONTROL[name](eqn, values, evaluation)
    # Not `custom_jvp` and `custom_vjp`: their derivatives would be lost.
    if name in CALLS and (body := called_body(eqn)) is not None:
        return walk(body, values, functools.partial(_visit, evaluation=evaluation))
    if any(isinstance(value, Runs) for value in values):
        return _visit_runs(eqn, values, evaluation=evaluation)
    if name in RULES or name == "dot_general":
        weight = next(value for value in values if isinstance(value, Weight))
        stored = _untransposed(eqn, values) if name == "dot_general" else (eqn, values)
        results = _by_rule(*stored, evaluation)
        if results is None:
            partly_plain = [with_plain_weight(value, name, evaluation.note) for value in values]
            changed = any(new is not old for new, old in zip(partly_plain, values, strict=True))
            values, results = partly_plain, _by_rule(eqn, partly_plain, evaluation) if changed else None
        if results is not None:
            source = weight.array if name == "transpose" and eqn.params["permutation"] == (1, 0) else None
            return [Weight(out, weight.path, transposed=source) if is_compressed(out) else out for out in results]
    return bind(eqn, _plain(eqn.invars, values, name, evaluation))


def _untransposed(eqn: Any, values: list[Any]) -> tuple[Any, list[Any]]:
    """The same product of matrices as they are stored."""
    contracted, batch = (list(axes) for axes in eqn.params["dimension_numbers"])
    values = list(values)
    for side, value in enumerate(values):
        if (
            isinstance(value, Weight)
            and value.transposed is not None
            and len(contracted[side]) == 1
            and not batch[side]
        ):
            values[side] = Weight(value.transposed, value.path)
            contracted[side] = (1 - contracted[side][0],)
    numbers = (tuple(contracted), tuple(batch))
    return eqn.replace(params=eqn.params | {"dimension_numbers": numbers}), values


def _visit_runs(eqn: Any, values: list[Any], *, evaluation: Evaluation) -> Sequence[Any]:
    """What only casts or cuts a stack leaves its runs in their stored forms."""
    name, first = eqn.primitive.name, values[0]
    if isinstance(first, Runs) and name == "convert_element_type":
        return [Runs(tuple(_visit(eqn, [part], evaluation=evaluation)[0] for part in first.parts))]
    if isinstance(first, Runs) and name == "slice" and (pieces := sliced_runs(eqn, first, evaluation.note)) is not None:
        return [pieces]
    whole = [
        as_typed(plain(value, name, evaluation.note), var.aval) if isinstance(value, Runs) else value
        for value, var in zip(values, eqn.invars, strict=True)
    ]
    return _visit(eqn, whole, evaluation=evaluation)


def _plain(variables: Sequence[Any], values: Sequence[Any], name: str, evaluation: Evaluation) -> list[Any]:
    return [
        as_typed(plain(value, name, evaluation.note), var.aval) for value, var in zip(values, variables, strict=True)
    ]


def _by_rule(eqn: Any, values: list[Any], evaluation: Evaluation) -> Sequence[Any] | None:
    arrays = [value.array if isinstance(value, Weight) else value for value in values]
    if eqn.primitive.name == "dot_general":
        path = next(value.path for value in values if isinstance(value, Weight))
        rule = functools.partial(_dot_general, evaluation, path)
    else:
        rule = RULES[eqn.primitive.name]
    if explicit_mesh(arrays) is None:
        return rule(eqn, arrays)
    # The rule computes on Auto axes, where its equation may not ask for a sharding; its results get the traced one.
    auto = eqn.replace(params=eqn.params | dict.fromkeys(_SHARDINGS & set(eqn.params)))
    results = on_auto_axes(functools.partial(rule, auto))(arrays)
    return results and [as_typed(result, var.aval) for result, var in zip(results, eqn.outvars, strict=True)]


_SHARDINGS = {"sharding", "out_sharding"}


def _dot_general(evaluation: Evaluation, path: str, eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    left, right = values
    result = evaluation.multiply(left, right, eqn.params, path)
    return None if result is None else [result]


def _remat(eqn: Any, values: list[Any], evaluation: Evaluation) -> Sequence[Any]:
    def run(*operands: Any) -> list[Any]:
        return _interpret(as_body(eqn.params["jaxpr"]), operands, evaluation)

    return jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])(*values)


def _scan(eqn: Any, values: list[Any], evaluation: Evaluation) -> Sequence[Any]:
    """Once, or run by run where a stack is stored in several forms."""
    begin, length = eqn.params["num_consts"], eqn.params["length"]
    end = begin + eqn.params["num_carry"]
    carry, stacks = _plain(eqn.invars[begin:end], values[begin:end], "scan", evaluation), values[end:]
    runs = boundaries(stacks, length) or [(0, 0)]
    written: dict[tuple[int, int], list[Any]] = {}
    for run in reversed(runs) if eqn.params["reverse"] else runs:
        pieces = [cut(stack, *run, evaluation.note) for stack in stacks]
        carry, written[run] = _scan_run(eqn, values[:begin], carry, pieces, run[1] - run[0], evaluation)
    if len(runs) == 1:
        return [*carry, *written[runs[0]]]
    columns = zip(*(written[run] for run in runs), strict=True)
    joined = [on_auto_axes(jax.numpy.concatenate)(list(column)) for column in columns]
    return [*carry, *(as_typed(out, var.aval) for out, var in zip(joined, eqn.outvars[len(carry) :], strict=True))]


def _scan_run(
    eqn: Any, consts: list[Any], carry: list[Any], stacks: list[Any], length: int, evaluation: Evaluation
) -> tuple[list[Any], list[Any]]:
    variables = eqn.invars[len(consts) + len(carry) :]
    stacked = [
        stack
        if not isinstance(stack, Weight) or can_unstack(stack.array)
        else _plain([var], [stack], "scan", evaluation)[0]
        for var, stack in zip(variables, stacks, strict=True)
    ]

    def step(carry: list[Any], sliced: list[Any]) -> tuple[list[Any], list[Any]]:
        results = _interpret(as_body(eqn.params["jaxpr"]), [*consts, *carry, *sliced], evaluation)
        return results[: len(carry)], results[len(carry) :]

    options = {name: eqn.params[name] for name in ("reverse", "unroll")}
    return jax.lax.scan(step, carry, stacked, length=length, **options)


def _while(eqn: Any, values: list[Any], evaluation: Evaluation) -> Sequence[Any]:
    cond_end = eqn.params["cond_nconsts"]
    body_end = cond_end + eqn.params["body_nconsts"]
    carry = _plain(eqn.invars[body_end:], values[body_end:], "while", evaluation)

    def condition(carry: list[Any]) -> Any:
        return _interpret(as_body(eqn.params["cond_jaxpr"]), [*values[:cond_end], *carry], evaluation)[0]

    def step(carry: list[Any]) -> list[Any]:
        return _interpret(as_body(eqn.params["body_jaxpr"]), [*values[cond_end:body_end], *carry], evaluation)

    return jax.lax.while_loop(condition, step, carry)


def _cond(eqn: Any, values: list[Any], evaluation: Evaluation) -> Sequence[Any]:
    def run(branch: Any, *operands: Any) -> list[Any]:
        return _interpret(as_body(branch), operands, evaluation)

    branches = [functools.partial(run, branch) for branch in eqn.params["branches"]]
    return jax.lax.switch(values[0], branches, *values[1:])


_CONTROL: dict[str, Callable[[Any, list[Any], Evaluation], Sequence[Any]]] = {
    "remat": _remat,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}


def _tagged(keys: tuple[Any, ...], leaf: Any) -> Any:
    if not is_compressed(leaf):
        return leaf
    # The keys begin with (args or kwargs, number or name of the argument).
    argument, inner = keys[1], keys[2:]
    first = keys[0].idx == 0 and argument.idx == 0
    path = path_string(inner) if first else f"[{path_string((argument,))}]/{path_string(inner)}"
    if (axes := varying_axes(leaf)) and (reason := why_no_share(leaf)) is not None:
        raise ValueError(
            f"Leaf {path!r} was cut along {sorted(axes)} so that a device has no share to compute with: {reason}. "
            "`arrays.component_shardings` says how a leaf can be cut."
        )
    return Weight(varying(leaf, axes), path)
