"""Where a model uses its kernels: their inputs, and what is added to their outputs."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp

from jaxcompress._src.calibration.flat_program import FlatProgram, Flattening, Weight
from jaxcompress._src.calibration.leaf_part import LeafPart
from jaxcompress._src.trace.graph import graph_of
from jaxcompress._src.trace.traced import traced
from jaxcompress._src.trace.walk import bind
from jaxcompress._src.tree.maps import leaves_by_path, leaves_with_paths
from jaxcompress._src.types import Params

Repeated = Literal["refuse", "first", "each"]
"""A kernel in several matmuls is refused, or is a site once, or in each of them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Operand:
    """A value of the program, read as rows.

    Attributes:
        var: the value.
        order: its axes, those of the rows first.
        width: size of a row.
    """

    var: Any
    order: tuple[int, ...]
    width: int

    def rows(self, value: Any) -> Any:
        """The value as a matrix, one row for each token."""
        return value.transpose(self.order).reshape(-1, self.width)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """One kernel at work: it writes `inputs @ W + bias + residual`.

    Attributes:
        kernel: where W is.
        bias: where the bias is that is added to the output, and that nothing else reads; None without one.
        inputs: its input.
        residual: what the output is added to; None if it is added to nothing.
        written: what it writes.
    """

    kernel: LeafPart
    bias: LeafPart | None
    inputs: Operand
    residual: Operand | None
    written: Operand


def sites_of(
    apply: Callable[..., Any],
    params: Params,
    inputs: Sequence[Any],
    *,
    paths: Sequence[str],
    repeated: Repeated = "refuse",
) -> tuple[FlatProgram, list[Site]]:
    """The program of a model, and a site for every use of some kernels, in the order of the model.

    The layers of a scan over stacked kernels come one after another, each entry of a stack is a kernel of its own. A
    kernel's site ends where something reads its output that is no addition of a bias or of a residual; leading axes
    may be merged and split on the way.

    Args:
        apply: `(params, *inputs) -> outputs`.
        params: arrays, compressed arrays or `jax.ShapeDtypeStruct`.
        inputs: of the model, arrays or `jax.ShapeDtypeStruct`.
        paths: of kernels, each (or each stack entry) used in a matmul, on either side (`x @ w`, `w @ x`), which may sum
            over several axes. The entries of a stack are what a scan runs over, or what `w[i]` cuts out.
        repeated: what becomes of a kernel that several matmuls share: "refuse" raises; "first": its first use is a
            site; "each": each use is.

    Returns:
        `(program, sites)`.

    Raises:
        ValueError: a kernel is in no matmul, or (see `repeated`) in several, or inside a `while`, `cond` or
            `shard_map`, or its matmul has batch axes (experts); names it.
    """
    return _traced(apply, params, inputs, paths, repeated, None, complete=True)


def sites_and_refusals(
    apply: Callable[..., Any], params: Params, *inputs: Any, repeated: Repeated = "refuse"
) -> tuple[list[LeafPart], dict[str, str]]:
    """Every kernel that has a site, and the leaves in matmuls that cannot have one, with the reason.

    Args:
        apply: `(params, *inputs) -> outputs`.
        params: arrays, or `jax.ShapeDtypeStruct`.
        *inputs: of the model, arrays or `jax.ShapeDtypeStruct`.
        repeated: what becomes of a kernel that several matmuls share, as for `sites_of`.

    Returns:
        `(parts, refused)`: in the order of the model; and path -> a sentence that names the leaf.

    Example:
        >>> def experts(params, x):
        ...     return jnp.einsum("end,edo->eno", x, params["w"])
        >>> sites_and_refusals(experts, {"w": jnp.ones((2, 3, 3))}, jnp.ones((2, 1, 3)))[1]["w"]
        "Leaf 'w' must be in a plain matmul; found a shape of (2, 3, 3), contracted over (1,), batched over (0,)."
    """
    parts, refused = _parts(apply, params, inputs, None, repeated)
    return [part for part in parts if part.path not in refused], refused


def kernels_at_work(
    apply: Callable[..., Any],
    params: Params,
    *inputs: Any,
    paths: Sequence[str] | None = None,
    repeated: Repeated = "refuse",
) -> list[LeafPart]:
    """The kernels of the sites of `sites_of`, in the order of the model.

    Args:
        apply: `(params, *inputs) -> outputs`.
        params: arrays, or `jax.ShapeDtypeStruct`.
        *inputs: of the model, arrays or `jax.ShapeDtypeStruct`.
        paths: as for `sites_of`; None: every leaf that is a kernel in the way that it asks for, others are passed
            over (`sites_and_refusals` says which, and why).
        repeated: what becomes of a kernel that several matmuls share, as for `sites_of`.

    Raises:
        ValueError: as `sites_of`, for the `paths` given; one error names all of them.

    Example:
        >>> import jax
        >>> params = {"layers": jnp.ones((2, 3, 3)), "head": jnp.ones((3, 4, 5))}
        >>> def apply(p, x):
        ...     x, _ = jax.lax.scan(lambda x, kernel: (x + x @ kernel, None), x, p["layers"])
        ...     return jnp.einsum("ni,ijk->njk", x, p["head"])
        >>> [part.name for part in kernels_at_work(apply, params, jnp.ones((1, 3)))]
        ['layers[0]', 'layers[1]', 'head']
    """
    parts, refused = _parts(apply, params, inputs, paths, repeated)
    if paths is not None and len(refused) == 1:
        raise ValueError(next(iter(refused.values())))
    if paths is not None and refused:
        reasons = "".join(f"\n  {reason}" for reason in refused.values())
        raise ValueError(f"The model cannot stop at {len(refused)} of the {len(paths)} leaves:{reasons}")
    return [part for part in parts if part.path not in refused]


def _parts(
    apply: Callable[..., Any], params: Params, inputs: Sequence[Any], paths: Sequence[str] | None, repeated: Repeated
) -> tuple[list[LeafPart], dict[str, str]]:
    """The kernels of all sites, and the paths without one, with the reason."""
    refused: dict[str, str] = {}
    every = [path for path, _ in leaves_with_paths(params)] if paths is None else paths
    _, sites = _traced(apply, params, inputs, every, repeated, refused, complete=paths is not None)
    parts = [site.kernel for site in sites]
    leaves = leaves_by_path(params)
    refused |= _unread_entries(parts, {part.path: tuple(leaves[part.path].shape) for part in parts}, refused)
    return parts, refused


def _unread_entries(
    parts: Sequence[LeafPart], shapes: Mapping[str, tuple[int, ...]], refused: Mapping[str, str]
) -> dict[str, str]:
    """Stacks of which some entries are in no matmul: the others cannot be stored without them."""
    missing = {}
    for path, shape in shapes.items():
        entries = [dict(part.entry) for part in parts if part.path == path]
        axes = sorted(entries[0])
        every = itertools.product(*(range(shape[axis]) for axis in axes))
        read = {tuple(entry[axis] for axis in axes) for entry in entries if sorted(entry) == axes}
        left = [list(entry) for entry in every if entry not in read]
        if path not in refused and left:
            missing[path] = f"Leaf {path!r} is a stack whose entries {left} are in no matmul of the model."
    return missing


def _traced(
    apply: Callable[..., Any],
    params: Params,
    inputs: Sequence[Any],
    paths: Sequence[str],
    repeated: Repeated,
    refused: dict[str, str] | None,
    *,
    complete: bool,
) -> tuple[FlatProgram, list[Site]]:
    """With `refused`, kernels that cannot have a site are noted there; without it they raise."""
    model = traced(apply, params, inputs)
    read_once = frozenset(path for path, count in graph_of(model).uses().items() if count == 1)
    tracer = _Tracer(frozenset(paths), read_once, repeated, refused)

    def operands() -> list[list[Any]]:
        if complete:
            tracer.check_all()
        return [[None if operand is None else operand.var for operand in _operands(site)] for site in tracer.sites]

    program, variables = tracer.trace(model, operands)
    sites = []
    for site, site_variables in zip(tracer.sites, variables, strict=True):
        pairs = zip(_operands(site), site_variables, strict=True)
        inputs_, residual, written = (None if o is None else dataclasses.replace(o, var=v) for o, v in pairs)
        sites.append(dataclasses.replace(site, inputs=inputs_, residual=residual, written=written))
    return program, sites


def _operands(site: Site) -> tuple[Operand, Operand | None, Operand]:
    return site.inputs, site.residual, site.written


@dataclasses.dataclass(frozen=True, eq=False)
class _Output:
    """What a kernel writes while the program is traced, as long as nothing else reads it.

    Its axes are rows, then outputs; axis i of the value is the axis `axes[i]` of those. `use` counts the uses of the
    kernel before this one, where each is a site. `residual` has the rows of the value, in the same order.
    """

    value: Any
    kernel: LeafPart
    inputs: Operand
    axes: tuple[int, ...]
    use: int
    bias: LeafPart | None = None
    residual: Operand | None = None

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of the value, rows first."""
        return tuple(self.axes.index(axis) for axis in range(len(self.axes)))

    @property
    def output_ndim(self) -> int:
        """Number of axes of outputs."""
        return len(self.kernel.output_axes)

    @property
    def width(self) -> int:
        """Number of outputs."""
        shape = [self.value.shape[axis] for axis in self.order]
        return math.prod(shape[len(shape) - self.output_ndim :])

    def keeps_rows(self, reshape: Any) -> bool:
        """Whether only the axes of the rows are merged or split: the rows themselves, and their order, stay."""
        before, after = self.value.shape, reshape.outvars[0].aval.shape
        rows, kept = self.value.ndim - self.output_ndim, len(after) - self.output_ndim
        if self.axes != tuple(range(self.value.ndim)) or reshape.params["dimensions"] is not None or kept < 0:
            return False
        return before[rows:] == after[kept:] and math.prod(before[:rows]) == math.prod(after[:kept])

    @property
    def key(self) -> Any:
        return self.kernel.path, self.kernel.entry, self.use


class _Tracer(Flattening):
    """Also follows what kernels write, until something reads it."""

    def __init__(
        self, paths: frozenset[str], read_once: frozenset[str], repeated: Repeated, refused: dict[str, str] | None
    ) -> None:
        super().__init__(paths, derivatives=False)
        # A leaf that something else reads, too, is no bias: another value would change that as well.
        self.read_once = read_once
        self.repeated = repeated
        # Path -> why it has no site; None: it raises.
        self.refused = refused
        self.uses: Counter[Any] = Counter()
        self.closed: set[Any] = set()
        self.sites: list[Site] = []

    def equation(self, eqn: Any, values: list[Any]) -> Sequence[Any]:
        name, first = eqn.primitive.name, values[0] if values else None
        if name == "dot_general" and (output := self.output(eqn, values)) is not None:
            return [output]
        if name in ("add", "add_any") and any(isinstance(value, _Output) for value in values):
            return [self.add(eqn, *values)]
        if isinstance(first, _Output) and self.is_open(first) and name in ("convert_element_type", "transpose"):
            value = bind(eqn, [first.value])[0]
            if name == "transpose":
                axes = tuple(first.axes[axis] for axis in eqn.params["permutation"])
                return [dataclasses.replace(first, axes=axes, value=value)]
            if is_float(eqn.params["new_dtype"]):
                return [dataclasses.replace(first, value=value)]
        if name == "reshape" and isinstance(first, _Output) and self.is_open(first) and first.keeps_rows(eqn):
            value = bind(eqn, [first.value])[0]
            return [dataclasses.replace(first, axes=tuple(range(value.ndim)), value=value)]
        return super().equation(eqn, values)

    def output(self, eqn: Any, values: list[Any]) -> _Output | None:
        places = [i for i, value in enumerate(values) if self.is_kernel(value)]
        if not places:
            return None
        place, weight = places[0], values[places[0]].view
        contracted, batch = eqn.params["dimension_numbers"]
        inputs = tuple(weight.axes[axis] for axis in contracted[place])
        outputs = tuple(axis for i, axis in enumerate(weight.axes) if i not in contracted[place])
        if batch[place] or not inputs or -1 in weight.axes:
            return self.refuse(
                weight.path,
                f"Leaf {weight.path!r} must be in a plain matmul; found a shape of {weight.shape}, "
                f"contracted over {tuple(contracted[place])}, batched over {tuple(batch[place])}.",
            )
        key = weight.path, weight.entry
        if self.uses[key] and self.repeated == "refuse":
            return self.refuse(
                weight.path, f"Leaf {weight.path!r} is in more than one matmul: it cannot be fitted to all of them."
            )
        use = self.uses[key] if self.repeated == "each" else 0
        self.uses[key] += 1
        plain = [self.plain(value) for value in values]
        other = plain[1 - place]
        summed = [contracted[1 - place][i] for i in sorted(range(len(inputs)), key=lambda i: inputs[i])]
        rows = [axis for axis in range(other.ndim) if axis not in summed]
        kernel = LeafPart(
            path=weight.path, entry=weight.entry, input_axes=tuple(sorted(inputs)), output_axes=tuple(sorted(outputs))
        )
        operand = Operand(other, (*rows, *summed), math.prod(other.shape[axis] for axis in summed))
        output_axes = tuple(len(rows) + sorted(outputs).index(axis) for axis in outputs)
        # The axes of the first operand come first.
        axes = (*output_axes, *range(len(rows))) if place == 0 else (*range(len(rows)), *output_axes)
        return _Output(bind(eqn, plain)[0], kernel, operand, axes, use)

    def add(self, eqn: Any, left: Any, right: Any) -> Any:
        """A bias and a residual may come in either order, once; of two outputs the first is the other's residual."""
        if self.is_open(left) and self.is_open(right):
            left = self.plain(left)
        output, other = (left, right) if self.is_open(left) else (right, left)
        if not self.is_open(output):
            return bind(eqn, [self.plain(left), self.plain(right)])[0]
        bias = self.bias(other, output) if output.bias is None and isinstance(other, Weight) else None
        added = self.plain(other)
        residual = output.residual is None and bias is None and jnp.shape(added) == output.value.shape
        if bias is None and not residual:
            self.plain(output)
        operands = [output.value, added] if output is left else [added, output.value]
        value = bind(eqn, operands)[0]
        if bias is not None:
            return dataclasses.replace(output, value=value, bias=bias)
        if residual:
            return dataclasses.replace(output, value=value, residual=Operand(added, output.order, output.width))
        return value

    def bias(self, other: Weight, output: _Output) -> LeafPart | None:
        """The part of a leaf, read by nothing else, that adds one number to each output of a kernel."""
        view = other.view
        if len(view.axes) != len(output.axes) or view.path not in self.read_once:
            return None
        axes, shape = ([whole[axis] for axis in output.order] for whole in (view.axes, view.shape))
        sizes = [output.value.shape[axis] for axis in output.order]
        rows = len(axes) - output.output_ndim
        same_entry = [index for _, index in view.entry] == [index for _, index in output.kernel.entry]
        in_order = -1 not in axes[rows:] and axes[rows:] == sorted(axes[rows:])
        if not same_entry or shape[rows:] != sizes[rows:] or set(axes[:rows]) - {-1} or not in_order:
            return None
        return LeafPart(path=view.path, entry=view.entry, output_axes=tuple(axes[rows:]))

    def plain(self, value: Any) -> Any:
        """The value itself: something reads it, and if a kernel writes it, its site ends here."""
        if not isinstance(value, _Output):
            return super().plain(value)
        if self.is_open(value):
            self.closed.add(value.key)
            ends = {"residual": value.residual, "written": Operand(value.value, value.order, value.width)}
            self.sites.append(Site(kernel=value.kernel, bias=value.bias, inputs=value.inputs, **ends))
        return value.value

    def is_open(self, value: Any) -> bool:
        return isinstance(value, _Output) and value.key not in self.closed

    def is_kernel(self, value: Any) -> bool:
        return isinstance(value, Weight) and self.is_stack(value)

    def refuse(self, path: str, message: str) -> None:
        if self.refused is None:
            raise ValueError(message)
        self.refused.setdefault(path, message)

    def pass_whole(self, name: str, values: Sequence[Any]) -> None:
        for value in values:
            if self.is_kernel(value):
                path = value.view.path
                self.refuse(path, f"Leaf {path!r} is used as a whole inside a `{name}`, where it cannot be fitted.")

    def check_all(self) -> None:
        """Refuses what has no site."""
        known = {path for path, _ in self.uses} | set(self.refused or ())
        for path in sorted(self.stacks - known):
            self.refuse(path, f"Leaf {path!r} is in no matmul of the model: there is nothing to fit it to.")
        for path, _ in sorted(set(self.uses) - {key[:2] for key in self.closed}):
            self.refuse(path, f"What leaf {path!r} writes is never read by the model: there is nothing to fit it to.")


def is_float(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))
