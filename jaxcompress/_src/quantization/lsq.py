"""Learned step sizes (LSQ, LSQ+) as a transform of weights."""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxcompress._src.arrays.quantized import split_blocks
from jaxcompress._src.meshes import transform_on_auto_axes
from jaxcompress._src.quantization.arithmetic import mean_magnitude
from jaxcompress._src.quantization.blocks import axes_of, reduced_axes, scale_shape
from jaxcompress._src.quantization.learned import learned_quantize_array, whole_zero_point
from jaxcompress._src.quantization.quantize import on_weight, weight_layouts
from jaxcompress._src.quantization.round_to_nearest import quantize_array_at
from jaxcompress._src.quantization.scales import block_scales, cast_scale, fixed_zero_points
from jaxcompress._src.quantization.spec import QuantSpec
from jaxcompress._src.trace.layout import LeafLayout
from jaxcompress._src.transforms import identity
from jaxcompress._src.tree.checks import check_finite
from jaxcompress._src.tree.maps import map_with_path
from jaxcompress._src.tree.unselected import Unselected, is_unselected, map_selected
from jaxcompress._src.types import Params, Selector, Transform, TransformState, exportable, plain

InitialScales = Literal["mean", "range"]


@exportable
class LearnedSteps(NamedTuple):
    """Trainable state of `lsq`: partial trees of one entry per block, float32.

    Attributes:
        scale: positive.
        zero_point: of asymmetric codes; `Unselected` where there is none.
    """

    scale: Params
    zero_point: Params


@transform_on_auto_axes
def lsq(
    spec: QuantSpec,
    *,
    initial_scales: InitialScales = "range",
    select: Selector | None = None,
    layouts: Params | None = None,
) -> Transform:
    """Trains with rounded weights whose scales (and zero points) are trained too, and stores them in the end.

    Symmetric specs give LSQ, asymmetric ones LSQ+ with zero points that are rounded, so that a weight of 0 stays 0. The
    derivatives are those of `learned_quantize_array`, with N the weights of a block. Scales are trained in float32 and
    rounded to `spec.scale_dtype` wherever they are used: what is trained is what is stored.

    Args:
        spec: any format with scales; LSQ's own codes for b bits are `convention="full"`.
        initial_scales: "range": those of `block_scales` (set `range_rule="mse"` for few bits); "mean":
            2 mean|w| / sqrt(Q_P), as in LSQ's paper, for symmetric integers.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`.

    Returns:
        The transform. Its trainable state is `LearnedSteps`; it needs a `transform_optimizer`. Adam moves a scale by
        its rate at every step: take one far below a typical scale, and another one for zero points, which count codes.

    Raises:
        ValueError: `initial_scales` that the format does not have, or fixed point; from `init` and `finalize`: as
            `quantize`.

    Example:
        >>> import jax
        >>> params = {"kernel": jnp.array([[0.7], [-0.32]])}
        >>> transform = lsq(QuantSpec(bits=4, convention="narrow"))
        >>> state = transform.init(params, key=jax.random.key(0))
        >>> state.trainable.scale["kernel"], transform.apply(params, state)["kernel"].tolist()
        (Array([[0.1]], dtype=float32), [[0.699999988079071], [-0.30000001192092896]])

    References:
        Esser et al., "Learned step size quantization", 2020; Bhalgat et al., "LSQ+", 2020.
    """
    if initial_scales not in get_args(InitialScales):
        raise ValueError(f"`initial_scales` must be one of {get_args(InitialScales)}, got {initial_scales!r}.")
    numbers = spec.number_format
    if not numbers.has_free_scale:
        raise ValueError(f"Format {numbers.name!r} has no scale to learn; take `quantization_aware`.")
    if spec.partial_groups:
        raise ValueError("Steps are learned for whole groups only: leave `partial_groups` at False.")
    if initial_scales == "mean" and not (numbers.is_integer and spec.symmetric):
        raise ValueError(f"`initial_scales` 'mean' is for symmetric integers; with {spec} take 'range'.")

    def layouts_of(params: Params) -> Params:
        return weight_layouts(params, select=select, layouts=layouts, spec=spec)

    def init(params: Params, *, key: Any, statistics: Any = None) -> TransformState:
        del key, statistics
        pairs = map_selected(
            lambda path, layout, leaf: _start(path, layout, leaf, spec, initial_scales), layouts_of(params), params
        )
        scales = map_selected(lambda _, pair: pair.scale.astype(jnp.float32), pairs)
        zero_points = map_selected(lambda _, pair: pair.learned_zero_point, pairs)
        return TransformState(LearnedSteps(scales, zero_points), ())

    def apply(params: Params, state: TransformState, *, key: Any = None) -> Params:
        del key
        return map_with_path(lambda _, leaf, *steps: _rounded(leaf, *steps, spec=spec), params, *state.trainable)

    def project(params: Params, state: TransformState) -> tuple[Params, TransformState]:
        scales, zero_points = state.trainable
        return params, TransformState(LearnedSteps(positive(scales), clip_zero_points(zero_points, spec)), state.fixed)

    def finalize(params: Params, state: TransformState) -> Params:
        store = functools.partial(_stored, spec=spec)
        return map_with_path(store, params, layouts_of(params), *state.trainable)

    return identity()._replace(init=init, apply=apply, project=project, finalize=finalize)


def positive(scales: Params) -> Params:
    """Scales above 0."""
    # A step that jumps below 0 starts again from next to nothing: its gradient then points up.
    smallest = float(jnp.finfo(jnp.float32).tiny)
    return map_selected(lambda _, scale: jnp.maximum(scale, smallest), scales)


def clip_zero_points(zero_points: Params, spec: QuantSpec) -> Params:
    """Zero points among the codes."""
    return map_selected(lambda _, zero_point: jnp.clip(zero_point, *spec.code_range), zero_points)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Not a pytree, so that trees of pairs are taken apart as a whole."""

    scale: Array
    zero_point: Array | None

    @property
    def learned_zero_point(self) -> Any:
        """Float; one that the format fixes is not learned."""
        if self.zero_point is None or self.zero_point.dtype != jnp.uint8:
            return Unselected
        return self.zero_point.astype(jnp.float32)


def _start(path: str, layout: LeafLayout, leaf: Any, spec: QuantSpec, initial_scales: InitialScales) -> _Pair:
    dense = jnp.asarray(plain(leaf))
    check_finite(path, dense)
    if initial_scales == "range":
        scale, zero_point = jax.jit(block_scales, static_argnums=(1, 2))(dense, spec, axes_of(layout))
        return _Pair(jnp.where(scale.astype(jnp.float32) > 0, scale, jnp.ones_like(scale)), zero_point)
    shape = scale_shape(dense.shape, spec, layout)
    mean = mean_magnitude(split_blocks(dense.astype(jnp.float32), shape), reduced_axes(dense.shape, shape))
    scale = (2 * mean / math.sqrt(spec.number_format.steps_above_zero)).reshape(shape)
    return _Pair(jnp.where(scale > 0, scale, 1.0), None)


def _rounded(leaf: Any, scale: Any, zero_point: Any, *, spec: QuantSpec) -> Any:
    if is_unselected(scale):
        return leaf
    zero_point = _learned_zero(scale, zero_point, spec)
    return on_weight(leaf, lambda weight: learned_quantize_array(jnp.asarray(plain(weight)), scale, zero_point, spec))


def _stored(path: str, leaf: Any, layout: Any, scale: Any, zero_point: Any, *, spec: QuantSpec) -> Any:
    if is_unselected(scale) or is_unselected(layout):
        return leaf
    whole = fixed_zero_points(scale.shape, spec, layout)
    if whole is None:
        whole = whole_zero_point(_learned_zero(scale, zero_point, spec), spec)

    def store(weight: Any) -> Any:
        check_finite(path, jnp.asarray(plain(weight)))
        return quantize_array_at(weight, cast_scale(scale, spec), whole, spec, layout)

    return on_weight(leaf, store)


def _learned_zero(scale: Any, zero_point: Any, spec: QuantSpec) -> Any:
    if not is_unselected(zero_point):
        return zero_point
    fixed = spec.number_format.fixed_zero_point
    return None if fixed is None else jnp.full((1,) * scale.ndim, fixed, jnp.float32)
