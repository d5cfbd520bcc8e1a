"""A model that stops at its kernels, and goes on with others."""

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.calibration._pausing_run import PausingRun
from jaxcompress.calibration._pending import Weight
from jaxcompress.calibration._site import LeafPart, Site
from jaxcompress.trace import Body, as_body, leaf_uses
from jaxcompress.tree import leaves_with_paths
from jaxcompress.types import Params

Pausing = Generator[Site, "tuple[Any, Any]", None]
"""Yields a site and is sent `(W, b)` to go on with: W (D, O); b (O,), of no matter where there is no bias."""


def pausing(apply: Callable[..., Any], paths: Sequence[str], params: Params, *inputs: Any) -> Pausing:
    """Runs a model up to its next kernel, again and again, in the order of the model.

    The model runs by its own jaxpr, operation by operation: no hooks, nothing model-specific, and one forward pass for
    all kernels together, although what one of them becomes decides what the next one sees. A scan over stacked layers
    runs layer by layer, and stops at each entry of a stack by itself.

    Args:
        apply: `(params, *inputs) -> outputs`.
        paths: of kernels, each (or each stack entry) used in exactly one matmul, which may sum over several axes.
        params: plain arrays.
        *inputs: of the model.

    Raises:
        ValueError: a kernel is in no matmul, or in several, or inside a `while`, `cond` or `shard_map`, or is not the
            second operand of its matmul, or its matmul has batch axes (experts); names it.

    Example:
        >>> params = {"kernel": jnp.ones((2, 1)), "bias": jnp.ones(1)}
        >>> run = pausing(lambda p, x: x @ p["kernel"] + x[:, :1], ["kernel"], params, jnp.ones((3, 2)))
        >>> site = next(run)
        >>> site.kernel.name, site.inputs.shape, site.residual.shape, site.bias
        ('kernel', (3, 2), (3, 1), None)
        >>> run.close()
    """
    return _pausing(_traced(apply, params, inputs), paths, params, inputs)


def side_by_side(
    apply: Callable[..., Any], paths: Sequence[str], trees: tuple[Params, Params], batches: Iterable[tuple[Any, ...]]
) -> Generator[list[tuple[Site, Site]], tuple[Any, Any], None]:
    """`pausing` of two models of one form on all batches, which wait for one another at every kernel.

    Args:
        apply: as there.
        paths: likewise.
        trees: the parameters of both models, of the same shapes and dtypes.
        batches: tuples of inputs; the model is traced once for all of the same shapes.

    Yields:
        The kernel in the first and in the second model, for each batch. It is sent the `(W, b)` to go on with in the
        first model, and those in the second.

    Example:
        >>> params = {"w": jnp.ones((2, 1))}
        >>> run = side_by_side(lambda p, x: x @ p["w"], ["w"], (params, params), [(jnp.ones((3, 2)),)])
        >>> [(dense.kernel.name, other.kernel.name) for dense, other in next(run)]
        [('w', 'w')]
        >>> run.close()
    """
    programs: dict[str, _Program] = {}
    runs = []
    for batch in batches:
        shapes = str(jax.tree.map(jax.typeof, batch))
        if shapes not in programs:
            programs[shapes] = _traced(apply, trees[0], batch)
        runs.append([_pausing(programs[shapes], paths, tree, batch) for tree in trees])
    replies: tuple[Any, Any] = None, None
    while True:
        pairs = [(_next(first, replies[0]), _next(second, replies[1])) for first, second in runs]
        sites = [(first, second) for first, second in pairs if first is not None and second is not None]
        if not sites:
            return
        replies = yield sites


def stops(
    apply: Callable[..., Any], params: Params, *inputs: Any, paths: Sequence[str] | None = None
) -> list[LeafPart]:
    """The kernels at which `pausing` stops, in its order; found without running the model.

    Args:
        apply: `(params, *inputs) -> outputs`.
        params: arrays, or `jax.ShapeDtypeStruct`.
        *inputs: of the model, likewise.
        paths: as for `pausing`; None: every leaf that is a kernel in the way that it asks for, others are passed over.

    Raises:
        ValueError: as `pausing`, for the `paths` given.

    Example:
        >>> params = {"layers": jnp.ones((2, 3, 3)), "head": jnp.ones((3, 4, 5))}
        >>> def apply(p, x):
        ...     x, _ = jax.lax.scan(lambda x, kernel: (x + x @ kernel, None), x, p["layers"])
        ...     return jnp.einsum("ni,ijk->njk", x, p["head"])
        >>> [part.name for part in stops(apply, params, jnp.ones((1, 3)))]
        ['layers[0]', 'layers[1]', 'head']
    """
    found: list[LeafPart] = []
    passed: set[str] | None = set() if paths is None else None
    every = [path for path, _ in leaves_with_paths(params)] if paths is None else paths

    def dry(params: Params, inputs: Any) -> None:
        leaves, reply = dict(leaves_with_paths(params)), None
        steps = _pausing(
            _traced(apply, params, inputs), every, params, inputs, passed=None if paths is not None else passed
        )
        while (site := _next(steps, reply)) is not None:
            found.append(site.kernel)
            kernel = site.kernel.matrix(leaves[site.kernel.path])
            reply = kernel, jnp.zeros(kernel.shape[1], kernel.dtype)

    jax.eval_shape(dry, params, inputs)
    return [part for part in found if not passed or part.path not in passed]


def _next(steps: Pausing, reply: Any) -> Site | None:
    try:
        return steps.send(reply)
    except StopIteration:
        return None


class _Program(NamedTuple):
    """A traced model, and the leaves that it reads once."""

    body: Body
    read_once: frozenset[str]


def _traced(apply: Callable[..., Any], params: Params, inputs: tuple[Any, ...]) -> _Program:
    closed = jax.make_jaxpr(apply)(params, *inputs)
    uses = leaf_uses(closed, params)
    return _Program(as_body(closed), frozenset(path for path, count in uses.items() if count == 1))


def _pausing(
    program: _Program, paths: Sequence[str], params: Params, inputs: tuple[Any, ...], passed: set[str] | None = None
) -> Pausing:
    """With `passed`, kernels at which it cannot stop are noted there; without it they raise."""
    run = PausingRun(frozenset(paths), program.read_once, passed)
    weights = [Weight(leaf, path, tuple(range(jnp.ndim(leaf)))) for path, leaf in leaves_with_paths(params)]
    for value in (yield from run.body(program.body, [*weights, *jax.tree.leaves(inputs)])):
        yield from run.plain(value)
    if passed is not None:
        return
    if missing := sorted(run.paths - {path for path, _ in run.seen}):
        raise ValueError(f"Leaf {missing[0]!r} is in no matmul of the model: there is nothing to fit it to.")
    if unread := sorted(run.seen - set(run.replies)):
        raise ValueError(
            f"What leaf {unread[0][0]!r} writes is never read by the model: there is nothing to fit it to."
        )
