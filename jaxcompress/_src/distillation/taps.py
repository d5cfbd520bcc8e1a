"""Intermediate tensors of a model, read out of its jaxpr by name, without changing the model."""

import contextlib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxcompress._src.execution.execute import execute
from jaxcompress._src.trace.traced import traced
from jaxcompress._src.trace.walk import CALLS, Body, as_body, bind, walk
from jaxcompress._src.tree.paths import path_string

Tensors = list[tuple[str, Any]]
"""(name, tensor), in the order of execution; a name may come more than once."""


def tap(apply: Callable[..., Any], taps: str | Mapping[str, str]) -> Callable[..., dict[str, Any]]:
    r"""`apply`, which also returns intermediate tensors: what losses on hidden states and attention compare.

    Tensors have names:

    - what Flax modules return, Linen's or NNX's: the path of the module, such as `encoder/layer/0/attention`. Of other
      methods than `__call__`, the path and the method. Of several results, `:` and the place of each, such as
      `encoder/layer/0:0`.
      The outermost module is left out: it returns the outputs.
    - what `jax.ad_checkpoint.checkpoint_name(x, name)` marks: the name.

    A tensor inside a `scan` (`nn.scan`, say) is stacked over its turns, along a new first axis. Those inside `while`,
    `cond`, `shard_map` and functions with derivatives of their own cannot be had. Works under `jit`, `grad`, `vmap` and
    `remat`, and takes compressed leaves as `execute` does.

    Modules inside of functions that are jitted by themselves (not around `apply`) and were called before keep their old
    trace, and are not found.

    Args:
        apply: pure, returns outputs by name.
        taps: output name -> regular expression: that output is the tuple of all tensors whose full names it matches
            (`re.fullmatch`), in the order of execution. Or one expression: every tensor becomes an output of its own
            name; where a name comes again, of `name[1]`, `name[2]`, ...

    Returns:
        A function of the same arguments that returns the outputs of `apply` and those tensors.

    Raises:
        ValueError: an output is there twice; when called: an expression matches no tensor (lists those there are), or
            `apply` does not return outputs by name.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> module = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)])
        >>> variables = module.init(jax.random.key(0), jnp.ones((1, 4)))
        >>> def apply(params, batch, *, key, train):
        ...     return {"logits": module.apply(params, batch["x"])}
        >>> tapped = tap(apply, {"hidden_states": r"layers_\d+"})
        >>> outputs = tapped(variables, {"x": jnp.ones((1, 4))}, key=None, train=False)
        >>> outputs["logits"].shape, [state.shape for state in outputs["hidden_states"]]
        ((1, 2), [(1, 3), (1, 2)])
    """
    patterns = [re.compile(pattern) for pattern in ([taps] if isinstance(taps, str) else taps.values())]

    def run(*args: Any, **kwargs: Any) -> dict[str, Any]:
        with _module_outputs_tagged():
            model = traced(lambda tree: apply(*tree[0], **tree[1]), (args, kwargs), ())
        body = as_body(model.closed)
        names, hidden = _names(body.jaxpr)
        _check_matches(patterns, names, hidden)
        results, tensors = _evaluated(body, model.leaves, lambda name: any(each.fullmatch(name) for each in patterns))
        outputs = model.outputs.unflatten(results)
        if not isinstance(outputs, Mapping):
            raise ValueError(f"`apply` must return outputs by name, in a mapping, got {type(outputs).__name__}.")
        if isinstance(taps, str):
            others = _numbered(tensors)
        else:
            others = {
                output: tuple(tensor for name, tensor in tensors if pattern.fullmatch(name))
                for output, pattern in zip(taps, patterns, strict=True)
            }
        if both := sorted(set(outputs) & set(others)):
            raise ValueError(f"The model has an output {both[0]!r} already; its outputs are {sorted(outputs)}.")
        return {**outputs, **others}

    return functools.wraps(apply)(execute(run))


def _check_matches(patterns: Iterable[Any], names: list[str], hidden: list[str]) -> None:
    for pattern in patterns:
        if not any(map(pattern.fullmatch, names)):
            listed = "".join(f"\n  {name}" for name in dict.fromkeys(names)) or " nothing"
            inside = "".join(f"\n  {name}" for name in dict.fromkeys(hidden))
            inside = inside and f"\nInside of `while`, `cond` and the like, where none can be had:{inside}"
            raise ValueError(f"{pattern.pattern!r} matches no tensor. There are:{listed}{inside}")


def _numbered(tensors: Tensors) -> dict[str, Any]:
    """The tensors by name; names that come again get a number.

    Example:
        >>> _numbered([("a", 1), ("b", 2), ("a", 3)])
        {'a': 1, 'b': 2, 'a[1]': 3}
    """
    by_name: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for name, tensor in tensors:
        number = counts.get(name, 0)
        by_name[f"{name}[{number}]" if number else name] = tensor
        counts[name] = number + 1
    return by_name


def _names(jaxpr: Any, *, reached: bool = True) -> tuple[list[str], list[str]]:
    """Names of the tags of a jaxpr that can be had, and of those that cannot."""
    names: list[str] = []
    hidden: list[str] = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "name":
            (names if reached else hidden).append(eqn.params["name"])
        for inner in _inner_jaxprs(eqn):
            more, more_hidden = _names(inner, reached=reached and eqn.primitive.name in _REACHED)
            names += more
            hidden += more_hidden
    return names, hidden


def _inner_jaxprs(eqn: Any) -> Iterator[Any]:
    for leaf in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
        if hasattr(leaf, "eqns"):
            yield leaf
        elif hasattr(leaf, "jaxpr"):
            yield leaf.jaxpr


def _evaluated(body: Body, values: Sequence[Any], wanted: Callable[[str], bool]) -> tuple[list[Any], Tensors]:
    """The outputs of a body, and the wanted tensors inside."""
    tensors: Tensors = []

    def visit(eqn: Any, values: list[Any]) -> Sequence[Any]:
        name = eqn.primitive.name
        if name == "name" and wanted(eqn.params["name"]):
            tensors.append((eqn.params["name"], values[0]))
        if name in _REACHED and any(map(wanted, _names(eqn.params["jaxpr"])[0])):
            results, inner = _REACHED[name](eqn, values, wanted)
            tensors.extend(inner)
            return results
        return bind(eqn, values)

    return walk(body, values, visit), tensors


def _call(eqn: Any, values: list[Any], wanted: Callable[[str], bool]) -> tuple[list[Any], Tensors]:
    return _evaluated(as_body(eqn.params["jaxpr"]), values, wanted)


def _remat(eqn: Any, values: list[Any], wanted: Callable[[str], bool]) -> tuple[list[Any], Tensors]:
    names: list[str] = []

    def run(*operands: Any) -> tuple[list[Any], list[Any]]:
        results, tensors = _evaluated(as_body(eqn.params["jaxpr"]), operands, wanted)
        names[:] = [name for name, _ in tensors]
        return results, [tensor for _, tensor in tensors]

    rematerialized = jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    results, tensors = rematerialized(*values)
    return results, list(zip(names, tensors, strict=True))


def _scan(eqn: Any, values: list[Any], wanted: Callable[[str], bool]) -> tuple[list[Any], Tensors]:
    begin = eqn.params["num_consts"]
    end = begin + eqn.params["num_carry"]
    names: list[str] = []

    def step(carry: list[Any], sliced: list[Any]) -> tuple[list[Any], tuple[list[Any], list[Any]]]:
        operands = [*values[:begin], *carry, *sliced]
        results, tensors = _evaluated(as_body(eqn.params["jaxpr"]), operands, wanted)
        names[:] = [name for name, _ in tensors]
        return results[: end - begin], (results[end - begin :], [tensor for _, tensor in tensors])

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, (stacks, tensors) = jax.lax.scan(step, values[begin:end], values[end:], **options)
    return [*carry, *stacks], list(zip(names, tensors, strict=True))


_REACHED: dict[str, Callable[..., tuple[list[Any], Tensors]]] = {
    **dict.fromkeys(CALLS, _call),
    **dict.fromkeys(("remat", "remat2", "checkpoint"), _remat),
    "scan": _scan,
}
"""Primitives whose inner tensors can be had."""


@contextlib.contextmanager
def _module_outputs_tagged() -> Iterator[None]:
    """Whatever Flax modules return is marked by `checkpoint_name`, with the path of the module."""
    with contextlib.ExitStack() as stack:
        # Who has not imported them has no such modules.
        if "flax.linen" in sys.modules:
            stack.enter_context(sys.modules["flax.linen"].intercept_methods(_linen_interceptor))
        if "flax.nnx" in sys.modules:
            stack.enter_context(_nnx_methods_wrapped(sys.modules["flax.nnx"]))
        yield


def _linen_interceptor(method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    result = method(*args, **kwargs)
    return _tagged(result, context.module.path, context.method_name) if _is_public(context.method_name) else result


def _tagged(result: Any, path: Sequence[Any], method: str) -> Any:
    """What a public method of a module returned, with names."""
    name = "/".join(map(str, [*path, *([] if method == "__call__" else [method])]))

    def tag(keys: Any, leaf: Any) -> Any:
        full = f"{name}:{path_string(keys)}" if keys else name
        return checkpoint_name(leaf, full) if name and isinstance(leaf, jax.Array) else leaf

    # Other nodes, such as modules of NNX, are handed on as they are.
    return jax.tree_util.tree_map_with_path(tag, result, is_leaf=lambda x: not isinstance(x, tuple | list | Mapping))


def _is_public(method: str) -> bool:
    return method == "__call__" or not (method.startswith("_") or method == "setup")


@contextlib.contextmanager
def _nnx_methods_wrapped(nnx: Any) -> Iterator[None]:
    """The methods of all NNX modules name what they return; NNX has no interceptors, and wraps methods itself."""
    paths: list[dict[int, tuple[Any, ...]]] = []
    originals: list[tuple[type, str, Any]] = []

    def wrapped(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            known = dict(paths[-1]) if paths else {}
            if id(module) not in known:
                # The outermost module, or one that a transformation of NNX has copied.
                prefix = (type(module).__name__,) if paths else ()
                known |= {id(each): (*prefix, *path) for path, each in nnx.iter_modules(module)}
            paths.append(known)
            try:
                result = method(module, *args, **kwargs)
            finally:
                paths.pop()
            return _tagged(result, known[id(module)], name)

        return call

    for cls in _subclasses(nnx.Module) - {nnx.Module}:
        for name, method in list(vars(cls).items()):
            if inspect.isfunction(method) and _is_public(name):
                originals.append((cls, name, method))
                setattr(cls, name, wrapped(name, method))
    try:
        yield
    finally:
        for cls, name, method in originals:
            setattr(cls, name, method)


def _subclasses(cls: type) -> set[type]:
    return {cls}.union(*map(_subclasses, cls.__subclasses__()))
