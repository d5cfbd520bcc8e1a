"""Quantization-aware training as a transform."""

import jax.numpy as jnp

from jaxcompress._src.meshes import transform_on_auto_axes
from jaxcompress._src.quantization.fake_quant import straight_through
from jaxcompress._src.quantization.quantize import fake_quantize, quantize
from jaxcompress._src.quantization.spec import QuantSpec
from jaxcompress._src.schedules import final_value, warn_unfinished
from jaxcompress._src.transforms import identity
from jaxcompress._src.tree.checks import is_traced
from jaxcompress._src.tree.maps import map_with_path
from jaxcompress._src.types import Params, Schedule, Selector, Transform, TransformState, plain


@transform_on_auto_axes
def quantization_aware(
    spec: QuantSpec,
    *,
    begin: int = 0,
    bits: Schedule | None = None,
    select: Selector | None = None,
    layouts: Params | None = None,
) -> Transform:
    """Trains with rounded weights (straight-through), and stores them quantized in the end.

    `apply` rounds by `fake_quantize`, `finalize` stores by `quantize`, so that both give the same weights; the scales
    follow the weights. It can stand behind a pruning transform: zeros stay zero, and sparse leaves keep their index.
    If training ended before `begin` or before the last of `bits`, `finalize` stores the bits of the spec nevertheless,
    which no step has seen, and warns (`UnfinishedScheduleWarning`).

    Args:
        spec: format, granularity, range.
        begin: number of updates after which rounding begins. Before that, `apply` returns `params`; the law that
            `finalize` stores what `apply` returns holds from there on.
        bits: number of updates -> bits, of integers: 8 at first, say, and fewer and fewer. Its values are rounded to
            whole numbers and clipped to [2, 8]; it must end at `spec.bits`, which is what `finalize` stores.
        select: which leaves; resolved on the tree at hand at every call. By default every weight.
        layouts: from `trace.layouts`.

    Returns:
        The transform. Its state is empty, but for a counter of updates (int32) with `begin` > 0 or `bits`.

    Raises:
        ValueError: `begin` is negative; `bits` with a format that has no choice of bits, or with an end at others than
            those of the spec.

    Example:
        >>> from jaxcompress._src.types import TransformState
        >>> params, state = {"kernel": jnp.array([[7.0], [-3.2]])}, TransformState((), ())
        >>> transform = quantization_aware(QuantSpec(bits=4, convention="narrow"))
        >>> transform.apply(params, state)["kernel"]
        Array([[ 7.], [-3.]], dtype=float32)
        >>> transform.finalize(params, state)["kernel"].codes()
        Array([[ 7], [-3]], dtype=int8)

    References:
        Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference",
        2018, section 3.
    """
    if begin < 0:
        raise ValueError(f"`begin` must not be negative, got {begin}.")

    if bits is not None and not spec.number_format.is_integer:
        raise ValueError(f"A schedule of `bits` is for integers of 2 bits or more, got {spec}.")
    if bits is not None and round(final_value(bits, name="bits")) != spec.bits:
        end = final_value(bits, name="bits")
        raise ValueError(f"`bits` must end at the {spec.bits} bits of the spec, which are stored; it ends at {end:g}.")

    def finalize(params: Params, state: TransformState) -> Params:
        _warn_before_the_end(spec, begin, bits, state)
        return quantize(params, spec, select=select, layouts=layouts)[0]

    def apply(params: Params, state: TransformState, *, key=None) -> Params:
        del key
        now = None if bits is None else jnp.clip(jnp.round(jnp.asarray(bits(state.fixed), jnp.float32)), 2, 8)
        rounded = fake_quantize(params, spec, select=select, layouts=layouts, bits=now)
        return rounded if begin == 0 else _switch(state.fixed >= begin, rounded, params)

    if begin == 0 and bits is None:
        return identity()._replace(apply=apply, finalize=finalize)
    return identity()._replace(init=_count_from_zero, apply=apply, update=_count, finalize=finalize)


def _warn_before_the_end(spec: QuantSpec, begin: int, bits: Schedule | None, state: TransformState) -> None:
    if (begin == 0 and bits is None) or is_traced(state.fixed) or int(state.fixed) == 0:
        return
    steps = int(state.fixed)
    if steps < begin:
        warn_unfinished(
            f"Training ended after {steps} updates, and rounding begins after {begin}: `finalize` rounds weights to "
            f"{spec.bits} bits that were never trained so."
        )
    if bits is not None and (now := round(float(bits(steps)))) != spec.bits:
        warn_unfinished(
            f"Training ended after {steps} updates, at {now} bits; `finalize` rounds to {spec.bits}, which were never "
            "trained."
        )


def _count_from_zero(params: Params, *, key, statistics=None) -> TransformState:
    del params, key, statistics
    return TransformState((), jnp.zeros((), jnp.int32))


def _count(grads, state: TransformState, params: Params, *, key, loss) -> tuple[TransformState, None]:
    del grads, params, key, loss
    return TransformState((), state.fixed + 1), None


def _switch(begun, rounded: Params, params: Params) -> Params:
    """`rounded` where it has begun, else `params`."""

    def visit(_: str, leaf, new):
        if new is leaf:
            return leaf
        dense = plain(leaf)
        # A select is fused into the rounding; a `cond` would copy the tree.
        return straight_through(jnp.where(begun, new, dense), dense)

    return map_with_path(visit, params, rounded)
