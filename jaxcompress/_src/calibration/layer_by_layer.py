"""The layer-by-layer engine: models that wait at each kernel until it is known what it becomes."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxcompress._src.calibration.flat_program import FlatProgram, variables
from jaxcompress._src.calibration.leaf_part import meet
from jaxcompress._src.calibration.segments import Model, Segments, by_shape, segments_of
from jaxcompress._src.calibration.sites import Operand, Repeated, Site, sites_of
from jaxcompress._src.meshes import on_auto_axes, sharded_like, shared_mesh
from jaxcompress._src.types import Params, plain


def layer_by_layer(
    apply: Callable[..., Any],
    paths: Sequence[str],
    trees: Sequence[Params],
    batches: Iterable[tuple[Any, ...]],
    *,
    repeated: Repeated = "refuse",
) -> "Iterator[Stop]":
    """Runs models of one form on all batches, kernel by kernel, in the order of the model.

    The program of the model is cut into segments at its kernels. Each segment is compiled once: those of equal layers
    share a compilation. A batch holds only the values that later segments read.

    Args:
        apply: `(params, *inputs) -> outputs`.
        paths: of kernels, as for `sites_of`.
        trees: the parameters of each model, of the same shapes and dtypes, plain or compressed. The last one waits at
            every kernel; those before it stay as they are, and have written its output by then.
        batches: tuples of inputs; the model is traced once for all of the same shapes.
        repeated: what becomes of a kernel that several matmuls share, as for `sites_of`.

    Yields:
        Each kernel. What `Stop.replace` was told by the time that the next one is asked for is what the last model goes
        on with.

    Example:
        >>> params = {"kernel": jnp.ones((2, 1)), "bias": jnp.ones(1)}
        >>> def apply(p, x):
        ...     return x @ p["kernel"] + x[:, :1]
        >>> for stop in layer_by_layer(apply, ["kernel"], [params], [(jnp.ones((3, 2)),)]):
        ...     rows = stop.rows(0, 0)
        ...     print(stop.kernel.name, stop.bias, rows.inputs.shape, rows.residual.shape)
        kernel None (3, 2) (3, 1)
    """
    batches = list(batches)
    programs = by_shape(batches, lambda batch: _cut(*sites_of(apply, trees[0], batch, paths=paths, repeated=repeated)))
    models = [Model(tree, [program.segments for program in programs], batches) for tree in trees]
    sites = [program.sites for program in programs]
    for number, block in enumerate(programs[0].blocks if programs else ()):
        for model in models:
            model.run(2 * number)
        for model in models[:-1]:
            model.run(2 * number + 1)
        for place in block:
            yield Stop([program_sites[place] for program_sites in sites], models)
        models[-1].run(2 * number + 1)


class Rows(NamedTuple):
    """One kernel at work on one batch: it writes `inputs @ W + bias + residual`.

    Attributes:
        inputs: (N, D), one row for each token.
        residual: (N, O), what the output is added to; None if it is added to nothing.
        written: (N, O), the output, of a model that does not wait; None of one that does.
    """

    inputs: jax.Array
    residual: jax.Array | None
    written: jax.Array | None


class Stop:
    """A kernel at which a model waits.

    Attributes:
        kernel: where it is.
        bias: where the bias is that is added to its output, and that nothing else reads; None without one.
    """

    def __init__(self, sites: Sequence[Site], models: Sequence[Model]) -> None:
        self._sites, self._models = sites, models
        self.kernel, self.bias = sites[0].kernel, sites[0].bias

    def rows(self, batch: int, model: int) -> Rows:
        """What goes into the kernel, by the numbers of the batch and of the model; -1 is the one that waits."""
        site, values = self._sites[batch], self._models[model].values[batch]
        return Rows(*(_rows(each, values) for each in (site.inputs, site.residual, site.written)))

    def pairs(self) -> list[tuple[Rows, Rows]]:
        """The rows of every batch, in the first model and in the last one."""
        return [(self.rows(batch, 0), self.rows(batch, -1)) for batch in range(len(self._models[-1].values))]

    def weights(self, model: int) -> tuple[jax.Array, jax.Array]:
        """The kernel (D, O) of a model, and its bias (O,): zeros, in the dtype of the kernel, without one."""
        leaves = self._models[model].leaves
        kernel = self.kernel.matrix(jnp.asarray(plain(leaves[self.kernel.path])))
        if self.bias is None:
            return kernel, jnp.zeros(kernel.shape[1], kernel.dtype)
        return kernel, self.bias.matrix(jnp.asarray(plain(leaves[self.bias.path])))[0]

    def replace(self, kernel: Any = None, bias: Any = None) -> None:
        """Sets the kernel (D, O) and the bias (O,) that the last model goes on with; None: it stays."""
        for part, matrix in ((self.kernel, kernel), (self.bias, bias)):
            if part is not None and matrix is not None:
                model = self._models[-1]
                leaf = model.leaves[part.path]
                array = part.array(jnp.asarray(matrix, jnp.result_type(leaf.dtype)), leaf.shape)
                if shared_mesh((leaf, array)) is not None:
                    # What runs on it has been compiled for the sharding of the dense kernel.
                    array = sharded_like(array, plain(model.part(part.path, part.entry)))
                model.put(part.path, part.entry, array)


class _Cut(NamedTuple):
    """A program, cut at its sites.

    Attributes:
        sites: of kernels.
        blocks: sites that depend on no other one of their block, by their numbers.
        segments: for each block two: up to the inputs of its kernels, and what they write.
    """

    sites: list[Site]
    blocks: list[list[int]]
    segments: Segments


def _cut(program: FlatProgram, sites: list[Site]) -> _Cut:
    blocks = _blocks(program, sites)
    goals: list[tuple[list[Any], int]] = []
    for number, block in enumerate(blocks):
        block_sites = [sites[place] for place in block]
        # What goes into a kernel is looked at until the next block begins.
        goals.append(([var for site in block_sites for var in _read(site)], 2 * number + 1))
        goals.append(([site.written.var for site in block_sites], 2 * number + 1))
    return _Cut(sites, blocks, segments_of(program, goals))


def _blocks(program: FlatProgram, sites: Sequence[Site]) -> list[list[int]]:
    """Runs of sites none of which depends on what another one of them becomes."""
    # Bit i: it depends on site i.
    depends = dict.fromkeys(program.views, 0)
    for place, site in enumerate(sites):
        for part in (site.kernel,) if site.bias is None else (site.kernel, site.bias):
            for var, view in program.views.items():
                if view.path == part.path and meet(view.entry, part.entry):
                    depends[var] |= 1 << place
    for eqn in program.body.jaxpr.eqns:
        if any(var not in program.views for var in eqn.outvars):
            needed = 0
            for var in variables(eqn.invars):
                needed |= depends.get(var, 0)
            depends |= {var: needed for var in eqn.outvars if var not in program.views}
    blocks: list[list[int]] = []
    for place, site in enumerate(sites):
        before = 0
        for var in variables(_read(site)):
            before |= depends.get(var, 0)
        if not blocks or any(before >> other & 1 for other in blocks[-1]):
            blocks.append([])
        blocks[-1].append(place)
    return blocks


def _read(site: Site) -> list[Any]:
    return [site.inputs.var] if site.residual is None else [site.inputs.var, site.residual.var]


def _rows(operand: Operand | None, values: Mapping[Any, Any]) -> Any:
    if operand is None or not (isinstance(operand.var, core.Literal) or operand.var in values):
        return None
    value = operand.var.val if isinstance(operand.var, core.Literal) else values[operand.var]
    plain = operand.order == (0, 1)
    return value if plain else _as_rows(value, order=operand.order, width=operand.width)


@on_auto_axes
@functools.partial(jax.jit, static_argnames=("order", "width"))
def _as_rows(value: Any, order: tuple[int, ...], width: int) -> Any:
    return value.transpose(order).reshape(-1, width)
