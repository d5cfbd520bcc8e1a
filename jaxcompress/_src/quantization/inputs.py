"""Quantization of what weights are multiplied with, on an unmodified model."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.arrays.input_quantized import InputQuantizedArray, stored_quantizer
from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.arrays.straight_through import straight_through
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.quantization.learned import Gradient, learned_quantize_array, whole_zero_point
from jaxcompress._src.quantization.rounding import round_to_codes
from jaxcompress._src.quantization.rounding_info import RoundingInfo, storage_infos
from jaxcompress._src.quantization.scales import block_scales
from jaxcompress._src.quantization.spec import QuantSpec
from jaxcompress._src.trace.layout import LeafLayout
from jaxcompress._src.tree.maps import map_with_path
from jaxcompress._src.tree.unselected import Unselected, is_unselected, map_selected
from jaxcompress._src.types import Params, Selector
from jaxcompress._src.weights.selection import BlockError, selected_layouts, without_misfits


@dataclasses.dataclass(frozen=True)
class InputRange:
    """The static range of a leaf's inputs; no pytree, so that a tree of ranges is a partial tree.

    Attributes:
        scale: float32, of the leaf's stacked sizes; a scalar for most leaves.
        zero_point: uint8, of the same shape, or None.
    """

    scale: Any
    zero_point: Any = None


@stored_quantizer
@dataclasses.dataclass(frozen=True, kw_only=True)
class InputRounding:
    """The `arrays.InputQuantizer` of a spec.

    Attributes:
        spec: of the inputs; blocks run along the axes that the matmul sums over.
        gradient: of static scales, while they are learned; see `learned_quantize_array`.
    """

    spec: QuantSpec
    gradient: Gradient = "lsq"

    def to_json(self) -> dict[str, Any]:
        """The fields, as files hold them.

        Raises:
            TypeError: a number format without a name in the table of formats.
        """
        if not isinstance(self.spec.format, str):
            raise TypeError(f"files hold number formats by names in `FORMATS`, got {self.spec.format!r}")
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(content: dict[str, Any]) -> "InputRounding":
        """The inverse of `to_json`.

        Raises:
            ValueError: other fields, or impossible ones.
        """
        try:
            fields: dict[str, Any] = {**content, "spec": QuantSpec(**content["spec"])}
            return InputRounding(**fields)
        except (KeyError, TypeError) as err:
            raise ValueError(f"{content!r} does not describe how inputs are rounded: {err}") from err

    def codes(self, x: Any, axes: Sequence[int], scale: Any, zero_point: Any) -> QuantizedArray:
        """The codes of an input."""
        if scale is None:
            scale, zero_point = block_scales(x, self.spec, _layout(x, axes))
        zero_point = _whole(zero_point, self.spec)
        codes = round_to_codes(x, scale, zero_point, self.spec)
        return QuantizedArray(
            data=codes, scale=scale, zero_point=zero_point, dtype=jnp.dtype(x.dtype), levels=self.spec.levels
        )

    def rounded(self, x: Any, axes: Sequence[int], scale: Any, zero_point: Any) -> jax.Array:
        """The values of the codes: straight through if the range is dynamic, learned steps if it is static."""
        if scale is None:
            return straight_through(self.codes(jax.lax.stop_gradient(x), axes, None, None).materialize(), x)
        features = 1
        for axis in axes:
            features *= x.shape[axis]
        zero_point = None if zero_point is None else zero_point.astype(jnp.float32)
        return learned_quantize_array(x, scale, zero_point, self.spec, count=features, gradient=self.gradient)


@on_auto_axes
def quantize_inputs(
    params: Params,
    spec: QuantSpec,
    *,
    ranges: Params | None = None,
    select: Selector | None = None,
    layouts: Params | None = None,
) -> tuple[Params, dict[str, RoundingInfo]]:
    """Marks weights so that `execute` quantizes what they are multiplied with.

    Without `ranges`, ranges are dynamic: found in every call from the input at hand, one scale for each token (row of
    the matmul), or for each group of it (`group_size`), or for the whole input (`per_tensor`). With them they are
    static. Where the weight is stored as integers with one scale along the summed axes (int8 for each channel, say),
    and the input has one too, the matmul runs as int8 x int8 -> int32.

    Args:
        params: plain or quantized leaves; quantize weights first.
        spec: of the inputs. `symmetric=False` uses all codes where most inputs have one sign (behind GELU or ReLU).
        ranges: from `input_ranges`, with the same spec.
        select: which leaves; by default every weight that is multiplied (not tables that are only looked up).
        layouts: from `trace.layouts`.

    Returns:
        `(params, info)`: an `InputQuantizedArray` for every selected leaf, and a `RoundingInfo` by path (`path[i]` for
        each entry of a stack) with the bits per weight, ranges included.

    Raises:
        ValueError: nothing is selected; a leaf without a range; static ranges with a spec that is not `per_tensor`;
            stacked axes that do not lead; groups that do not divide the inputs of a leaf (names it), or of outputs.

    Example:
        >>> import jaxcompress as jc
        >>> params, _ = quantize_inputs({"kernel": jnp.eye(2)}, QuantSpec(bits=2, convention="narrow"))
        >>> jc.execute(lambda p, x: x @ p["kernel"])(params, jnp.array([[4.0, 1.0], [1.0, 0.9]]))
        Array([[4., 0.],
               [1., 1.]], dtype=float32)

    References:
        Yao et al., "ZeroQuant", 2022 (dynamic, token by token).
    """
    check_input_spec(spec, static=ranges is not None)
    rounding = InputRounding(spec=spec)
    selected = multiplied_layouts(params, select=select, layouts=layouts)
    if ranges is None and spec.group_size is not None:
        selected = without_misfits(selected, params, functools.partial(_check_groups, spec=spec), select)
    entries = map_selected(lambda *_: None, selected) if ranges is None else ranges

    def visit(path: str, leaf: Any, layout: Any, entry: Any) -> Any:
        if is_unselected(layout):
            return leaf
        if ranges is None:
            return with_input_rounding(leaf, rounding)
        if not isinstance(entry, InputRange):
            raise ValueError(f"Leaf {path!r} is selected, but `ranges` has none for it; got {entry!r}.")
        check_stack(path, leaf, layout, entry)
        return with_input_rounding(leaf, rounding, scale=entry.scale, zero_point=entry.zero_point)

    marked = map_with_path(visit, params, selected, entries)
    return marked, storage_infos(marked, selected)


def with_input_rounding(leaf: Any, rounding: InputRounding, **static: Any) -> InputQuantizedArray:
    """The leaf with its inputs rounded in this way, and in no other one."""
    weight = leaf.weight if isinstance(leaf, InputQuantizedArray) else leaf
    return InputQuantizedArray(weight=weight, inputs=rounding, **static)


def multiplied_layouts(params: Params, *, select: Selector | None, layouts: Params | None) -> Params:
    """The layouts of the selected leaves, without the tables that are only looked up unless they were asked for."""
    selected = selected_layouts(params, select=select, layouts=layouts)
    if select is not None:
        return selected
    return map_selected(lambda _, layout: Unselected if layout.kind == "lookup" else layout, selected)


def check_input_spec(spec: QuantSpec, *, static: bool) -> None:
    """Raises for specs that inputs cannot have."""
    if spec.group_outputs > 1:
        raise ValueError(f"Inputs have no outputs to group: leave `group_outputs` at 1, got {spec.group_outputs}.")
    if spec.partial_groups:
        raise ValueError("Groups of inputs are whole ones: leave `partial_groups` at False.")
    if static and not spec.per_tensor:
        raise ValueError("Static ranges are one for all inputs of a leaf: set `per_tensor=True` in the spec.")
    if not static and spec.range_rule == "entropy":
        raise ValueError("`range_rule` 'entropy' is for static ranges: give `ranges`, from `input_ranges`.")
    if spec.scale_dtype == "bfloat16":
        raise ValueError("Scales of inputs are not stored one by one: leave `scale_dtype` at 'float32'.")


def check_stack(path: str, leaf: Any, layout: LeafLayout, entry: InputRange) -> None:
    """Raises unless a range has one entry for each stacked copy, and those lead."""
    leading = layout.stack_axes == tuple(range(len(layout.stack_axes)))
    stack = tuple(leaf.shape[axis] for axis in layout.stack_axes)
    if not leading or jnp.shape(entry.scale) != stack:
        raise ValueError(
            f"Leaf {path!r} has the stacked axes {layout.stack_axes} of sizes {stack}: they must come first, and its "
            f"range must have that shape, got {jnp.shape(entry.scale)}."
        )


def _check_groups(path: str, shape: Sequence[int], layout: LeafLayout, spec: QuantSpec) -> None:
    sizes = [shape[axis] for axis in layout.input_axes]
    if spec.group_size is not None and sizes and sizes[-1] % spec.group_size:
        raise BlockError(f"`group_size` {spec.group_size} does not divide the inputs {sizes} of leaf {path!r}.")


def _whole(zero_point: Any, spec: QuantSpec) -> Any:
    learned = zero_point is not None and zero_point.dtype != jnp.uint8
    return whole_zero_point(zero_point, spec) if learned else zero_point


def _layout(x: Any, axes: Sequence[int]) -> LeafLayout:
    inputs = tuple(sorted(axes))
    return LeafLayout(
        kind="other", input_axes=inputs, output_axes=tuple(axis for axis in range(x.ndim) if axis not in inputs)
    )
