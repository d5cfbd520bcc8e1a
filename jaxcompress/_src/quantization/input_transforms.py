"""Quantization of inputs during training: dynamic ranges, learned steps, learned clipping."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.meshes import transform_on_auto_axes
from jaxcompress._src.quantization.arithmetic import divide
from jaxcompress._src.quantization.inputs import (
    InputRange,
    InputRounding,
    check_input_spec,
    check_stack,
    multiplied_layouts,
    quantize_inputs,
    with_input_rounding,
)
from jaxcompress._src.quantization.learned import whole_zero_point
from jaxcompress._src.quantization.lsq import LearnedSteps, clip_zero_points, positive
from jaxcompress._src.quantization.spec import QuantSpec
from jaxcompress._src.transforms import identity
from jaxcompress._src.tree.maps import map_with_path
from jaxcompress._src.tree.unselected import Unselected, is_unselected, map_selected
from jaxcompress._src.types import Params, Selector, Transform, TransformState


@transform_on_auto_axes
def quantized_inputs(
    spec: QuantSpec, *, ranges: Params | None = None, select: Selector | None = None, layouts: Params | None = None
) -> Transform:
    """Trains with rounded inputs of matmuls, by `quantize_inputs`; gradients pass straight through dynamic ranges.

    It stands behind the transforms that act on weights: `chain(lsq(weights), quantized_inputs(inputs))`.

    Args:
        spec: of the inputs.
        ranges: from `input_ranges`; they stay as they are. None: found anew for each input.
        select: which leaves; by default every weight that is multiplied (not tables that are only looked up).
        layouts: from `trace.layouts`.

    Returns:
        The transform, without state. What `apply` returns has `InputQuantizedArray` leaves: run it by `execute`.

    Example:
        >>> transform = quantized_inputs(QuantSpec(bits=8))
        >>> type(transform.apply({"kernel": jnp.eye(2)}, TransformState((), ()))["kernel"]).__name__
        'InputQuantizedArray'
    """
    check_input_spec(spec, static=ranges is not None)

    def mark(params: Params, state: TransformState, *, key: Any = None) -> Params:
        del state, key
        return quantize_inputs(params, spec, ranges=ranges, select=select, layouts=layouts)[0]

    return identity()._replace(apply=mark, finalize=mark)


@transform_on_auto_axes
def lsq_inputs(spec: QuantSpec, *, select: Selector | None = None, layouts: Params | None = None) -> Transform:
    """Static ranges of inputs that are trained: LSQ for symmetric specs, LSQ+ for asymmetric ones.

    The derivatives are those of `learned_quantize_array`, with N the features of the input. Zero points are rounded, so
    that an input of 0 stays 0.

    Args:
        spec: of the inputs; `per_tensor`.
        select: which leaves; by default every weight that is multiplied (not tables that are only looked up).
        layouts: from `trace.layouts`.

    Returns:
        The transform. `init` takes as `statistics` the ranges to begin with, from `input_ranges`; its trainable state
        is `LearnedSteps`, so that it needs a `transform_optimizer`.

    Raises:
        ValueError: the spec is not `per_tensor`; from `init`: no ranges.

    Example:
        >>> import jax
        >>> transform = lsq_inputs(QuantSpec(bits=4, per_tensor=True))
        >>> ranges = {"kernel": InputRange(scale=jnp.float32(0.5))}
        >>> transform.init({"kernel": jnp.eye(2)}, key=jax.random.key(0), statistics=ranges).trainable.scale
        {'kernel': Array(0.5, dtype=float32)}

    References:
        Esser et al., "Learned step size quantization", 2020; Bhalgat et al., "LSQ+", 2020.
    """
    check_input_spec(spec, static=True)
    rounding = InputRounding(spec=spec)

    def init(params: Params, *, key: Any, statistics: Any = None) -> TransformState:
        del key
        ranges = _ranges(multiplied_layouts(params, select=select, layouts=layouts), params, statistics)
        scales = map_selected(lambda _, entry: jnp.asarray(entry.scale, jnp.float32), ranges)
        return TransformState(LearnedSteps(scales, map_selected(_float_zero_point, ranges)), ())

    def apply(params: Params, state: TransformState, *, key: Any = None) -> Params:
        del key
        return map_with_path(lambda _, leaf, *steps: _static(leaf, *steps, rounding=rounding), params, *state.trainable)

    def project(params: Params, state: TransformState) -> tuple[Params, TransformState]:
        scales, zero_points = state.trainable
        return params, TransformState(LearnedSteps(positive(scales), clip_zero_points(zero_points, spec)), state.fixed)

    def finalize(params: Params, state: TransformState) -> Params:
        zero_points = map_selected(lambda _, zero: whole_zero_point(zero, spec), state.trainable.zero_point)
        return map_with_path(
            lambda _, leaf, *steps: _static(leaf, *steps, rounding=rounding),
            params,
            state.trainable.scale,
            zero_points,
        )

    return identity()._replace(init=init, apply=apply, project=project, finalize=finalize)


@transform_on_auto_axes
def pact_inputs(
    bits: int = 4, *, strength: float = 1e-4, select: Selector | None = None, layouts: Params | None = None
) -> Transform:
    """PACT: inputs are clipped to [0, α] with a trained α, rounded to 2^b - 1 steps, and λ Σ α² is added to the loss.

    dα counts the inputs at or above α alone. Negative inputs become 0: it is for what comes out of a ReLU, so give
    `select`.

    Args:
        bits: b, bits of a code, in [2, 8].
        strength: λ, the weight of the penalty on the clipping levels.
        select: which leaves; by default every weight that is multiplied (not tables that are only looked up).
        layouts: from `trace.layouts`.

    Returns:
        The transform. `init` takes as `statistics` ranges of `QuantSpec(bits, symmetric=False, per_tensor=True)`, whose
        upper ends α begins with. Its trainable state is the partial tree of α.

    Raises:
        ValueError: `bits` or `strength` out of range; from `init`: no ranges.

    Example:
        >>> import jax
        >>> transform = pact_inputs(4)
        >>> ranges = {"kernel": InputRange(scale=jnp.float32(0.2), zero_point=jnp.uint8(0))}
        >>> transform.init({"kernel": jnp.eye(2)}, key=jax.random.key(0), statistics=ranges).trainable
        {'kernel': Array(3., dtype=float32)}

    References:
        Choi et al., "PACT: parameterized clipping activation for quantized neural networks", 2018.
    """
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"`bits` must be an integer in [2, 8], got {bits!r}.")
    if not strength >= 0:
        raise ValueError(f"`strength` must not be negative, got {strength}.")
    rounding = InputRounding(spec=QuantSpec(bits=bits, symmetric=False, per_tensor=True), gradient="pact")
    steps = 2**bits - 1

    def init(params: Params, *, key: Any, statistics: Any = None) -> TransformState:
        del key
        ranges = _ranges(multiplied_layouts(params, select=select, layouts=layouts), params, statistics)
        return TransformState(map_selected(lambda _, entry: _upper_end(entry, steps), ranges), ())

    def clip(params: Params, state: TransformState, *, key: Any = None) -> Params:
        del key

        def visit(_: str, leaf: Any, alpha: Any) -> Any:
            if is_unselected(alpha):
                return leaf
            zero_point = jnp.zeros(alpha.shape, jnp.uint8)
            return with_input_rounding(leaf, rounding, scale=divide(alpha, steps), zero_point=zero_point)

        return map_with_path(visit, params, state.trainable)

    def penalty(state: TransformState, params: Params, *, loss: Any) -> Any:
        del params, loss
        squares = [jnp.sum(jnp.square(alpha)) for alpha in jax.tree.leaves(state.trainable)]
        return strength * sum(squares, start=jnp.zeros((), jnp.float32))

    def project(params: Params, state: TransformState) -> tuple[Params, TransformState]:
        return params, TransformState(positive(state.trainable), state.fixed)

    return identity()._replace(init=init, apply=clip, penalty=penalty, project=project, finalize=clip)


def _ranges(layouts: Params, params: Params, ranges: Params | None) -> Params:
    if ranges is None:
        raise ValueError("Learned ranges of inputs begin with calibrated ones: give `statistics`, from `input_ranges`.")

    def visit(path: str, layout: Any, leaf: Any, entry: Any) -> InputRange:
        if not isinstance(entry, InputRange):
            raise ValueError(f"Leaf {path!r} is selected, but `statistics` has no range for it; got {entry!r}.")
        check_stack(path, leaf, layout, entry)
        return entry

    return map_selected(visit, layouts, params, ranges)


def _static(leaf: Any, scale: Any, zero_point: Any, *, rounding: InputRounding) -> Any:
    if is_unselected(scale):
        return leaf
    zero_point = None if is_unselected(zero_point) else zero_point
    return with_input_rounding(leaf, rounding, scale=scale, zero_point=zero_point)


def _float_zero_point(_: str, entry: InputRange) -> Any:
    return Unselected if entry.zero_point is None else jnp.asarray(entry.zero_point, jnp.float32)


def _upper_end(entry: InputRange, steps: int) -> Any:
    zero_point = 0.0 if entry.zero_point is None else jnp.asarray(entry.zero_point, jnp.float32)
    return jnp.asarray(entry.scale, jnp.float32) * (steps - zero_point)
