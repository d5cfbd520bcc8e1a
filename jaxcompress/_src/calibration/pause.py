"""A model that stops at its kernels, and goes on with others."""

import itertools
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress._src.calibration.pausing_run import PausingRun, Repeated
from jaxcompress._src.calibration.pending import Weight
from jaxcompress._src.calibration.site import LeafPart, Site
from jaxcompress._src.trace.graph import leaf_uses
from jaxcompress._src.trace.walk import Body, as_body
from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.types import Params

Pausing = Generator[Site, "tuple[Any, Any]", None]
"""Yields a site and is sent `(W, b)` to go on with: W (D, O); b (O,), of no matter where there is no bias."""


def pausing(
    apply: Callable[..., Any], paths: Sequence[str], params: Params, *inputs: Any, repeated: Repeated = "refuse"
) -> Pausing:
    """Runs a model up to its next kernel, again and again, in the order of the model.

    The model runs by its own jaxpr, operation by operation: no hooks, nothing model-specific, and one forward pass for
    all kernels together, although what one of them becomes decides what the next one sees. A scan over stacked layers
    runs layer by layer, and stops at each entry of a stack by itself.

    Args:
        apply: `(params, *inputs) -> outputs`.
        paths: of kernels, each (or each stack entry) used in a matmul, on either side (`x @ w`, `w @ x`), which may sum
            over several axes. The entries of a stack are what a scan runs over, or what `w[i]` cuts out.
        params: plain arrays.
        *inputs: of the model.
        repeated: what becomes of a kernel that several matmuls share: "refuse" raises; at "first" the model stops once,
            and all of them go on with the same reply; at "each" it stops at every one.

    Raises:
        ValueError: a kernel is in no matmul, or (see `repeated`) in several, or inside a `while`, `cond` or
            `shard_map`, or its matmul has batch axes (experts); names it.

    Example:
        >>> params = {"kernel": jnp.ones((2, 1)), "bias": jnp.ones(1)}
        >>> run = pausing(lambda p, x: x @ p["kernel"] + x[:, :1], ["kernel"], params, jnp.ones((3, 2)))
        >>> site = next(run)
        >>> site.kernel.name, site.inputs.shape, site.residual.shape, site.bias
        ('kernel', (3, 2), (3, 1), None)
        >>> run.close()
    """
    return _pausing(_traced(apply, params, inputs), paths, params, inputs, repeated)


def side_by_side(
    apply: Callable[..., Any],
    paths: Sequence[str],
    trees: tuple[Params, Params],
    batches: Iterable[tuple[Any, ...]],
    *,
    repeated: Repeated = "refuse",
) -> Generator[list[tuple[Site, Site]], tuple[Any, Any], None]:
    """`pausing` of two models of one form on all batches, which wait for one another at every kernel.

    Args:
        apply: `(params, *inputs) -> outputs`.
        paths: of kernels, as for `pausing`.
        trees: the parameters of both models, of the same shapes and dtypes.
        batches: tuples of inputs; the model is traced once for all of the same shapes.
        repeated: what becomes of a kernel that several matmuls share, as for `pausing`.

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
        runs.append([_pausing(programs[shapes], paths, tree, batch, repeated) for tree in trees])
    replies: tuple[Any, Any] = None, None
    while True:
        pairs = [(_next(first, replies[0]), _next(second, replies[1])) for first, second in runs]
        sites = [(first, second) for first, second in pairs if first is not None and second is not None]
        if not sites:
            return
        replies = yield sites


def stops(
    apply: Callable[..., Any],
    params: Params,
    *inputs: Any,
    paths: Sequence[str] | None = None,
    repeated: Repeated = "refuse",
) -> list[LeafPart]:
    """The kernels at which `pausing` stops, in its order; found without running the model.

    Args:
        apply: `(params, *inputs) -> outputs`.
        params: arrays, or `jax.ShapeDtypeStruct`.
        *inputs: of the model, arrays or `jax.ShapeDtypeStruct`.
        paths: as for `pausing`; None: every leaf that is a kernel in the way that it asks for, others are passed over
            (`stops_and_refusals` says which, and why).
        repeated: what becomes of a kernel that several matmuls share, as for `pausing`.

    Raises:
        ValueError: as `pausing`, for the `paths` given; one error names all of them.

    Example:
        >>> params = {"layers": jnp.ones((2, 3, 3)), "head": jnp.ones((3, 4, 5))}
        >>> def apply(p, x):
        ...     x, _ = jax.lax.scan(lambda x, kernel: (x + x @ kernel, None), x, p["layers"])
        ...     return jnp.einsum("ni,ijk->njk", x, p["head"])
        >>> [part.name for part in stops(apply, params, jnp.ones((1, 3)))]
        ['layers[0]', 'layers[1]', 'head']
    """
    found, refused = _dry_run(apply, params, inputs, paths, repeated)
    if paths is not None and len(refused) == 1:
        raise ValueError(next(iter(refused.values())))
    if paths is not None and refused:
        reasons = "".join(f"\n  {reason}" for reason in refused.values())
        raise ValueError(f"The model cannot stop at {len(refused)} of the {len(paths)} leaves:{reasons}")
    return [part for part in found if part.path not in refused]


def stops_and_refusals(
    apply: Callable[..., Any], params: Params, *inputs: Any, repeated: Repeated = "refuse"
) -> tuple[list[LeafPart], dict[str, str]]:
    """The kernels at which `pausing` stops, and the leaves in matmuls at which it cannot, with the reason.

    Args:
        apply: `(params, *inputs) -> outputs`.
        params: arrays, or `jax.ShapeDtypeStruct`.
        *inputs: of the model, arrays or `jax.ShapeDtypeStruct`.
        repeated: what becomes of a kernel that several matmuls share, as for `pausing`.

    Returns:
        `(parts, refused)`: in the order of the model; and path -> a sentence that names the leaf.

    Example:
        >>> def experts(params, x):
        ...     return jnp.einsum("end,edo->eno", x, params["w"])
        >>> stops_and_refusals(experts, {"w": jnp.ones((2, 3, 3))}, jnp.ones((2, 1, 3)))[1]["w"]
        "Leaf 'w' must be in a plain matmul; found a shape of (2, 3, 3), contracted over (1,), batched over (0,)."
    """
    found, refused = _dry_run(apply, params, inputs, None, repeated)
    return [part for part in found if part.path not in refused], refused


def _dry_run(
    apply: Callable[..., Any], params: Params, inputs: Any, paths: Sequence[str] | None, repeated: Repeated
) -> tuple[list[LeafPart], dict[str, str]]:
    """The stops in the order of the model, and the paths without one, with the reason; nothing is computed."""
    found: list[LeafPart] = []
    refused: dict[str, str] = {}
    every = [path for path, _ in leaves_with_paths(params)] if paths is None else paths

    def dry(params: Params, inputs: Any) -> None:
        leaves, reply = dict(leaves_with_paths(params)), None
        steps = _pausing(_traced(apply, params, inputs), every, params, inputs, repeated, refused, paths is not None)
        while (site := _next(steps, reply)) is not None:
            found.append(site.kernel)
            kernel = site.kernel.matrix(leaves[site.kernel.path])
            reply = kernel, jnp.zeros(kernel.shape[1], kernel.dtype)
        shapes = {path: jnp.shape(leaves[path]) for path in {part.path for part in found}}
        refused.update(_unread_entries(found, shapes, refused))

    jax.eval_shape(dry, params, inputs)
    return found, refused


def _unread_entries(
    found: Sequence[LeafPart], shapes: Mapping[str, tuple[int, ...]], refused: Mapping[str, str]
) -> dict[str, str]:
    """Stacks of which some entries are in no matmul: the others cannot be stored without them."""
    missing = {}
    for path, shape in shapes.items():
        own = [dict(part.entry) for part in found if part.path == path]
        axes = sorted(own[0])
        every = itertools.product(*(range(shape[axis]) for axis in axes))
        seen = {tuple(entry[axis] for axis in axes) for entry in own if sorted(entry) == axes}
        left = [list(entry) for entry in every if entry not in seen]
        if path not in refused and left:
            missing[path] = f"Leaf {path!r} is a stack whose entries {left} are in no matmul of the model."
    return missing


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
    program: _Program,
    paths: Sequence[str],
    params: Params,
    inputs: tuple[Any, ...],
    repeated: Repeated = "refuse",
    refused: dict[str, str] | None = None,
    complete: bool = True,
) -> Pausing:
    """With `refused`, kernels at which it cannot stop are noted there; without it they raise."""
    run = PausingRun(frozenset(paths), program.read_once, repeated, refused)
    weights = [Weight(leaf, path, tuple(range(jnp.ndim(leaf)))) for path, leaf in leaves_with_paths(params)]
    for value in (yield from run.body(program.body, [*weights, *jax.tree.leaves(inputs)])):
        yield from run.plain(value)
    if not complete:
        return
    known = {path for path, _ in run.uses} | set(refused or ())
    for path in sorted(run.paths - known):
        run.refuse(path, f"Leaf {path!r} is in no matmul of the model: there is nothing to fit it to.")
    for path, _ in sorted(set(run.uses) - {key for key, _ in run.replies}):
        run.refuse(path, f"What leaf {path!r} writes is never read by the model: there is nothing to fit it to.")
