"""Making up for removed units by least squares, layer by layer, without training."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.calibration.layer_by_layer import Stop, layer_by_layer
from jaxcompress._src.calibration.moments import flat_weights, moments, relative_error, targets
from jaxcompress._src.tree.maps import leaves_by_path, map_with_path
from jaxcompress._src.types import Params, is_compressed
from jaxcompress._src.units.group import UnitGroup, UnitSlices, index_owners
from jaxcompress._src.units.least_squares import fit_gates, fit_rows
from jaxcompress._src.units.shrink import check_keep, mask_units
from jaxcompress._src.units.slices import unit_masks

Fit = Literal["rows", "gates"]


def refit(
    apply: Callable[..., Any],
    params: Params,
    groups: Sequence[UnitGroup],
    keep: Mapping[str, Any],
    batches: Iterable[tuple[Any, ...]],
    *,
    fit: Fit = "rows",
    bias: bool = True,
    ridge: float = 1e-2,
    limit: float = 10.0,
    row_mask: Callable[..., Any] | None = None,
) -> tuple[Params, dict[str, dict[str, float]]]:
    """Fits the gated kernels of the kept units so that they stand in for the removed ones.

    Kernel after kernel, in the order of the model, with what came before already pruned and fitted: with x what the
    pruned model feeds into the kernel W, r what its output is added to, and t = y W + b + s the same of the dense
    model, it minimises Σ |x W' + b' + r - t|² over the rows of kept units (and b'), plus
    ridge · mean(diag Σ x xᵀ) · |W' - W|². So a sublayer makes up for the errors of those before it, too. Rows of
    removed units become 0: `shrink` takes them out without a change of the function.

    Args:
        apply: `(params, *inputs) -> outputs`; its gated kernels must each be in one plain matmul outside of loops.
        params: the dense tree, plain arrays.
        groups: the units.
        keep: name -> bool (count,). Kernels of groups without an entry stay as they are.
        batches: tuples of inputs; no labels are needed. All go through both models side by side, kernel by kernel:
            one forward pass each, and memory for what one layer holds for all of them, twice.
        fit: "rows": the whole rows of the kept units are free. "gates": one number for each unit multiplies its rows.
        bias: fit the bias too, where one is added to the output and nothing else reads it.
        ridge: how much the solution is held to where it was.
        limit: of the absolute value of gates.
        row_mask: `(*inputs) -> weights`, one for each row of the kernels' inputs (each token), 0 where it does not
            count; by default all count alike.

    Returns:
        The parameters, of the same shapes, and for each kernel `error_before` and `error`, after: the relative output
        error, sqrt(Σ |x W' + b' + r - t|² / Σ |t - r - b|²). With the inputs and the bias of the dense model that is
        ||X W' - X W|| / ||X W||.

    Raises:
        ValueError: an option out of range; no batches, or no row that counts; a kernel in no matmul, in several, or
            in a loop (stacked layers), or that several groups cut; a compressed leaf; inputs with NaN or Inf. Names
            the leaf.

    Example:
        >>> from jaxcompress.structured import UnitSlices
        >>> group = UnitGroup(name="in", count=2, slices=(UnitSlices(path="w", axis=0, gated=True),))
        >>> x = jnp.array([[1.0, 2.0], [2.0, 4.1], [3.0, 6.0]])  # the second input is twice the first
        >>> params, info = refit(
        ...     lambda p, x: x @ p["w"], {"w": jnp.ones((2, 1))}, [group], {"in": [True, False]}, [(x,)], ridge=0.0
        ... )
        >>> round(float(params["w"][0, 0]), 2), round(info["w"]["error_before"], 2), info["w"]["error"] < 1e-2
        (3.01, 0.67, True)

    References:
        Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", section 4.3: "gates", no bias.
    """
    check_keep(params, groups, keep)
    _check_options(fit, ridge, limit)
    batches = list(batches)
    if not batches:
        raise ValueError("`batches` is empty: least squares needs inputs.")
    owners = _owners(params, groups, keep)
    masks = unit_masks(params, [group for group in groups if group.name in keep], keep)
    rows = flat_weights(row_mask, batches)
    fitted, info = mask_units(params, groups, keep), {}
    paths = list(owners)
    for stop in layer_by_layer(apply, paths, (params, fitted), batches):
        owner, mask = owners[stop.kernel.path], masks[stop.kernel.path]
        _check_axis(stop, *owner)
        dense = stop.weights(0)
        sums = moments(stop.kernel.name, stop.pairs(), *dense, rows)
        wanted = targets(sums, *dense)
        # A bias that went with its sublayer must stay 0: `shrink` makes it so.
        free = bias and stop.bias is not None and bool(np.all(masks.get(stop.bias.path, True)))
        whole, before = _Kernel.of(params, stop), _Kernel.of(fitted, stop)
        inputs = np.flatnonzero(_kept_inputs(mask, params, stop))
        options = {"ridge": ridge, "free_bias": free}
        if fit == "rows":
            after = _Kernel(*fit_rows(wanted, whole.weight, before.bias, inputs, **options))
        else:
            units = _unit_of_row(*owner, len(whole.weight))
            after = _Kernel(*fit_gates(wanted, whole.weight, before.bias, inputs, units, limit=limit, **options))
        fitted = after.put(fitted, stop)
        stop.replace(after.weight, after.bias)
        errors = [relative_error(sums, *kernel.less(whole)).item() for kernel in (before, after)]
        info[stop.kernel.name] = dict(zip(("error_before", "error"), errors, strict=True))
    return fitted, info


class _Kernel(NamedTuple):
    """(inputs, outputs), and the bias, 0 where there is none; float64."""

    weight: np.ndarray
    bias: np.ndarray

    @classmethod
    def of(cls, params: Params, stop: Stop) -> "_Kernel":
        leaves = leaves_by_path(params)
        weight = np.asarray(stop.kernel.matrix(leaves[stop.kernel.path]), np.float64)
        if stop.bias is None:
            return cls(weight, np.zeros(weight.shape[1]))
        return cls(weight, np.asarray(stop.bias.matrix(leaves[stop.bias.path])[0], np.float64))

    def less(self, other: "_Kernel") -> tuple[jax.Array, jax.Array]:
        """What it differs by from another one."""
        return jnp.asarray(self.weight - other.weight, jnp.float32), jnp.asarray(self.bias - other.bias, jnp.float32)

    def put(self, params: Params, stop: Stop) -> Params:
        parts = {stop.kernel.path: (stop.kernel, self.weight)}
        if stop.bias is not None:
            parts[stop.bias.path] = stop.bias, self.bias

        def visit(path: str, leaf: Any) -> Any:
            if path not in parts:
                return leaf
            part, values = parts[path]
            return jnp.asarray(part.put(leaf, values))

        return map_with_path(visit, params)


def _kept_inputs(mask: Any, params: Params, stop: Stop) -> np.ndarray:
    """For each input, whether anything of it stays; another group may have cut the outputs."""
    leaf = leaves_by_path(params)[stop.kernel.path]
    return np.asarray(stop.kernel.matrix(np.broadcast_to(np.asarray(mask), leaf.shape)).any(axis=1))


def _check_axis(stop: Stop, group: UnitGroup, part: UnitSlices) -> None:
    if (part.axis,) != stop.kernel.input_axes:
        summed = ", ".join(str(axis) for axis in stop.kernel.input_axes)
        raise ValueError(
            f"Group {group.name!r} has gated slices on axis {part.axis} of {stop.kernel.path!r}, but the model sums "
            f"over axis {summed}: only what a kernel reads can be fitted."
        )


def _owners(
    params: Params, groups: Sequence[UnitGroup], keep: Mapping[str, Any]
) -> dict[str, tuple[UnitGroup, UnitSlices]]:
    """The group whose units cut each gated kernel."""
    owners: dict[str, tuple[UnitGroup, UnitSlices]] = {}
    leaves = leaves_by_path(params)
    for group in groups:
        for part in group.gated if group.name in keep else ():
            if is_compressed(leaves[part.path]):
                raise ValueError(f"Leaf {part.path!r} is compressed: refit before quantizing.")
            if part.unit is not None or leaves[part.path].ndim != 2:
                continue
            if part.path in owners:
                raise ValueError(
                    f"Leaf {part.path!r} has gated slices of {owners[part.path][0].name!r} and of {group.name!r}: "
                    "refit and `shrink` for one of them after the other."
                )
            owners[part.path] = group, part
    if not owners:
        raise ValueError("No group in `keep` has gated slices of a kernel: there is nothing to fit.")
    return owners


def _unit_of_row(group: UnitGroup, part: UnitSlices, rows: int) -> np.ndarray:
    """The unit of every row; rows of none are units of their own."""
    owners = index_owners(part, group.count, rows)
    return np.where(owners >= 0, owners, group.count + np.arange(rows))


def _check_options(fit: str, ridge: float, limit: float) -> None:
    if fit not in get_args(Fit):
        raise ValueError(f"`fit` must be 'rows' or 'gates', got {fit!r}.")
    if not ridge >= 0:
        raise ValueError(f"`ridge` must not be negative, got {ridge}.")
    if not limit > 0:
        raise ValueError(f"`limit` must be above 0, got {limit}.")
