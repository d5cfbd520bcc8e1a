"""Codes between two neighbours, while it is learned which of them to take."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxcompress._src.arrays.packed import PackedArray, pack
from jaxcompress._src.arrays.quantized import QuantizedArray, per_block, split_blocks
from jaxcompress._src.arrays.straight_through import straight_through
from jaxcompress._src.meshes import on_auto_axes


class Choice(NamedTuple):
    """What is fixed of a leaf: its codes, how far the other code of each weight is, and the leaf itself.

    `free` is 0 where all scales are powers of two: fixed-point and MX leaves, whose scales must stay; else 1.
    """

    codes: Float32[Array, "..."]
    step: Float32[Array, "..."]
    leaf: QuantizedArray
    free: Float32[Array, ""]


@on_auto_axes
def choice_of(leaf: QuantizedArray, dense: Any) -> Choice:
    """Between the code of each weight and its neighbour on the side of the dense weight."""
    codes = leaf.codes().astype(jnp.float32)
    low, high = _range(leaf)
    other = jnp.clip(codes + jnp.sign(_gap(leaf, dense)), low, high)
    mantissa, _ = jnp.frexp(leaf.scale.astype(jnp.float32))
    return Choice(codes, other - codes, leaf, jnp.any(mantissa != 0.5).astype(jnp.float32))


@on_auto_axes
def first_state(choice: Choice, dense: Any) -> dict[str, Any]:
    """What is learned: `v` decides between the codes, `u` moves the logarithms of the scales."""
    gap = jnp.abs(_gap(choice.leaf, dense))
    # Below 1/2: at the start, all decisions are for the codes as they are.
    share = jnp.clip(gap, 0.0, 0.49)
    inner = (share + 0.1) / 1.2
    return {"v": jnp.log(inner / (1 - inner)), "u": jnp.zeros(choice.leaf.scale.shape, jnp.float32)}


def decision(v: Any) -> Any:
    """H = clip(1.2 σ(v) - 0.1, 0, 1), the share of the other code."""
    return jnp.clip(1.2 * jax.nn.sigmoid(v) - 0.1, 0.0, 1.0)


@on_auto_axes
def soft_leaf(choice: Choice, state: Mapping[str, Any], scale_rate: float) -> Float[Array, "..."]:
    """The weights while codes are in between."""
    leaf, scale = choice.leaf, _scale(choice, state["u"], scale_rate)
    codes = choice.codes + choice.step * decision(state["v"])
    values = split_blocks(codes, scale.shape)
    zero_point = leaf.zero_points()
    if zero_point is not None:
        values = values - per_block(zero_point, leaf.shape, scale.shape)
    return (values * per_block(scale, leaf.shape, scale.shape)).reshape(leaf.shape).astype(leaf.dtype)


@on_auto_axes
def hard_leaf(choice: Choice, state: Mapping[str, Any], scale_rate: float) -> QuantizedArray:
    """The leaf with the code that is nearer."""
    leaf = choice.leaf
    codes = choice.codes + choice.step * (decision(state["v"]) >= 0.5)
    codes = codes.astype(leaf.codes().dtype)
    data = leaf.data
    data = pack(codes, bits=data.bits, axis=data.axis) if isinstance(data, PackedArray) else codes
    scale = _scale(choice, state["u"], scale_rate).astype(leaf.scale.dtype)
    return dataclasses.replace(leaf, data=data, scale=scale)


def _gap(leaf: QuantizedArray, dense: Any) -> Float32[Array, "..."]:
    """How far the dense weights are from the rounded ones, in codes."""
    blocks = leaf.scale.shape
    gap = split_blocks(dense.astype(jnp.float32) - leaf.materialize().astype(jnp.float32), blocks)
    return (gap / per_block(leaf.scale, leaf.shape, blocks)).reshape(leaf.shape)


def _range(leaf: QuantizedArray) -> tuple[float, float]:
    """What codes may be; symmetric codes keep to those that occur on both sides."""
    if leaf.zero_point is not None:
        return 0.0, 2.0**leaf.bits - 1
    lowest = jnp.minimum(leaf.codes().astype(jnp.float32).min(initial=0), -(2.0 ** (leaf.bits - 1) - 1))
    return float(lowest), 2.0 ** (leaf.bits - 1) - 1


def _scale(choice: Choice, u: Any, scale_rate: float) -> Any:
    """As it will be stored, in float32; its gradient is that of the scale before it is rounded."""
    scale = choice.leaf.scale.astype(jnp.float32) * jnp.exp(scale_rate * choice.free * u)
    return straight_through(scale.astype(choice.leaf.scale.dtype).astype(jnp.float32), scale)
