"""What goes into a kernel's matmul, and what its output is added to: read while the model runs.

Shape letters: N rows (tokens), D inputs of a kernel, O its outputs.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.trace import as_body, called_body, walk
from jaxcompress.tree import leaves_with_paths
from jaxcompress.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """One kernel at work: it writes `inputs @ W + bias + residual`.

    Attributes:
        inputs: rows of its input.
        residual: what the output is added to, in rows; None if it is added to nothing.
        bias: path of the bias that is added to the output; None without one.
        input_axis: the kernel's axis that is summed over; the other one is its outputs.
    """

    inputs: Float[Array, "N D"]
    residual: Float[Array, "N O"] | None
    bias: str | None
    input_axis: int


def record(apply: Callable[..., Any], paths: Sequence[str]) -> Callable[..., dict[str, Site]]:
    """`(params, *inputs) -> {path: Site}` for the kernels at `paths`, in the order in which they are used.

    The model runs by its own jaxpr: no hooks, nothing model-specific. Pure, so it can be compiled.

    Args:
        apply: `(params, *inputs) -> outputs`.
        paths: of kernels with two axes, each used in exactly one matmul.

    Raises:
        ValueError: from the function: a kernel is not used in a matmul, or in several, or inside a loop (stacked
            layers), or has not two axes, or its matmul has batch axes; names it.

    Example:
        >>> run = record(lambda p, x: x + x @ p["kernel"] + p["bias"], ["kernel"])
        >>> site = run({"kernel": jnp.ones((2, 2)), "bias": jnp.ones((1, 2))}, jnp.ones((3, 2)))["kernel"]
        >>> site.inputs.shape, site.residual.shape, site.bias, site.input_axis
        ((3, 2), (3, 2), None, 0)
    """

    def run(params: Params, *inputs: Any) -> dict[str, Site]:
        closed = jax.make_jaxpr(apply)(params, *inputs)
        named = [path for path, _ in leaves_with_paths(params)]
        leaves = jax.tree.leaves(params)
        recorder = _Recorder(set(paths))
        tagged = [_Weight(leaf, path, tuple(range(jnp.ndim(leaf)))) for path, leaf in zip(named, leaves, strict=True)]
        walk(as_body(closed), [*tagged, *jax.tree.leaves(inputs)], recorder.visit)
        return recorder.sites()

    return run


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A parameter, or a re-arrangement of one: `axes` says which of its axes are left, in order; -1 for new ones."""

    value: Any
    path: str
    axes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Output:
    """What a kernel has written so far: the product, or the product and its bias."""

    value: Any
    path: str


class _Recorder:
    def __init__(self, paths: set[str]) -> None:
        self.paths = paths
        self.found: dict[str, dict[str, Any]] = {}

    def sites(self) -> dict[str, Site]:
        if missing := sorted(self.paths - self.found.keys()):
            raise ValueError(f"Leaf {missing[0]!r} is in no matmul of the model: there is nothing to fit it to.")
        return {path: Site(**found) for path, found in self.found.items()}

    def visit(self, eqn: Any, values: list[Any]) -> Sequence[Any]:
        name = eqn.primitive.name
        if name == "dot_general":
            return [self._dot(eqn, *values)]
        if name in ("add", "add_any") and any(isinstance(value, _Output) for value in values):
            return [self._add(eqn, *values)]
        if name == "convert_element_type" and isinstance(values[0], _Output):
            return [_Output(_bind(eqn, values)[0], values[0].path)]
        if name in _LOOPS:
            self._check_outside(name, values)
        elif (body := called_body(eqn)) is not None:
            return walk(body, values, self.visit)
        results = _bind(eqn, values)
        if isinstance(values[0] if values else None, _Weight) and (axes := _moved(eqn, values[0].axes)) is not None:
            return [_Weight(results[0], values[0].path, axes)]
        return results

    def _dot(self, eqn: Any, left: Any, right: Any) -> Any:
        product = _bind(eqn, [left, right])[0]
        sides = [side for side in (left, right) if isinstance(side, _Weight) and side.path in self.paths]
        if not sides:
            return product
        path, weight = sides[0].path, sides[0]
        place = 0 if weight is left else 1
        contracted, batch = eqn.params["dimension_numbers"]
        other = _value((left, right)[1 - place])
        if path in self.found:
            raise ValueError(f"Leaf {path!r} is in more than one matmul: its units cannot be fitted.")
        axes = contracted[1 - place]
        # With the weight on the left, the output's first axis is the kernel's: the rows would be columns.
        if batch[place] or len(axes) != 1 or len(weight.axes) != 2 or -1 in weight.axes or place == 0:
            raise ValueError(
                f"Leaf {path!r} must have two axes and be the second operand of a plain matmul; found a shape of "
                f"{tuple(jnp.shape(weight.value))}, contracted over {tuple(contracted[place])}, batched over "
                f"{tuple(batch[place])}."
            )
        rows = jnp.moveaxis(other, axes[0], -1)
        self.found[path] = {
            "inputs": rows.reshape(-1, rows.shape[-1]),
            "residual": None,
            "bias": None,
            "input_axis": weight.axes[contracted[place][0]],
        }
        return _Output(product, path)

    def _add(self, eqn: Any, left: Any, right: Any) -> Any:
        total = _bind(eqn, [left, right])[0]
        output, other = (left, right) if isinstance(left, _Output) else (right, left)
        found = self.found[output.path]
        if isinstance(other, _Weight):
            # Along the last axis only: anything else is no bias.
            if found["bias"] is not None or other.axes != (*[-1] * (len(other.axes) - 1), 0):
                return total
            found["bias"] = other.path
            return _Output(total, output.path)
        if not isinstance(other, _Output) and jnp.shape(other) == total.shape:
            found["residual"] = other.reshape(-1, total.shape[-1])
        return total

    def _check_outside(self, name: str, values: list[Any]) -> None:
        for value in values:
            if isinstance(value, _Weight) and value.path in self.paths:
                raise ValueError(
                    f"Leaf {value.path!r} is used inside a `{name}`: unstack the layers before fitting it."
                )


_LOOPS = frozenset({"scan", "while", "cond"})


def _moved(eqn: Any, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes after an equation that only moves them; None after any other."""
    name = eqn.primitive.name
    if name in ("convert_element_type", "copy", "copy_p", "stop_gradient", "sharding_constraint"):
        return axes
    if name == "transpose":
        return tuple(axes[axis] for axis in eqn.params["permutation"])
    if name == "broadcast_in_dim":
        places: Mapping[int, int] = dict(zip(eqn.params["broadcast_dimensions"], axes, strict=True))
        return tuple(places.get(axis, -1) for axis in range(len(eqn.params["shape"])))
    if name == "reshape":
        # Only axes of size 1 may come or go, as they do for a bias.
        old = [axis for axis, size in zip(axes, eqn.invars[0].aval.shape, strict=True) if size != 1]
        new = [size for size in eqn.params["new_sizes"] if size != 1]
        if new != [size for size in eqn.invars[0].aval.shape if size != 1]:
            return None
        left = iter(old)
        return tuple(-1 if size == 1 else next(left) for size in eqn.params["new_sizes"])
    return None


def _value(value: Any) -> Any:
    return value.value if isinstance(value, (_Weight, _Output)) else value


def _bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*map(_value, values), **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]
