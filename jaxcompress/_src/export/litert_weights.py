"""Compressed leaves on their way into a LiteRT file.

The converter has no int8 matmuls with scales, and it folds and moves the constants that it sees. So the program that it
converts holds no weights of them at all: `HostWeight` puts a custom call where a matmul or a convolution is, and notes
in a `Site` what belongs there; `litert_file.py` makes the runtime's own operations of the calls, with these very codes.

Shape letters: O outputs, I inputs, G groups of inputs.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer

from jaxcompress._src.arrays.protocol import StoredArray, product_with_plain

PREFIX = "jaxcompress_site_"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """An operation of the runtime that one custom call of the program stands for.

    Attributes:
        kind: of the operation; `gelu` has none of the rest.
        codes: int8, (O, I); (O, height, width, I) of `conv`; (1, height, width, O) of `depthwise`.
        scale: float32, (O,); (O, G) of groups.
        bits: 8 or 4, of a stored code.
        rounded: whether the runtime rounds the inputs to 8 bits; if not, it computes in float32.
        strides: of a convolution, height and width.
        dilation: of a convolution, height and width.
        same: whether a convolution pads as TensorFlow's `SAME` does, or not at all.
        multiplier: outputs for each input of `depthwise`.
    """

    kind: Literal["fully_connected", "conv", "depthwise", "gelu"]
    codes: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int8))
    scale: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
    bits: int = 8
    rounded: bool = True
    strides: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    same: bool = False
    multiplier: int = 1


@dataclasses.dataclass(frozen=True)
class Sites:
    """What a program's custom calls stand for, and the forms that leaves took.

    Attributes:
        sites: by number, as in the names of the calls.
        forms: by path of a leaf, each once.
        floats: paths of compressed leaves that are, in some use, floats in the file.
    """

    sites: list[Site] = dataclasses.field(default_factory=list)
    forms: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    floats: set[str] = dataclasses.field(default_factory=set)

    def call(self, site: Site, inputs: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The custom call of a new site."""
        self.sites.append(site)
        result = jax.ShapeDtypeStruct(shape, jnp.float32)
        name = f"{PREFIX}{len(self.sites) - 1}"
        # Version 1, because the converter cannot write down the typed calls of later ones.
        return jax.ffi.ffi_call(name, result, custom_call_api_version=1)(inputs.astype(jnp.float32))

    def note(self, path: str, form: str) -> None:
        """Notes a form of a leaf."""
        forms = self.forms.setdefault(path, [])
        if form not in forms:
            forms.append(form)

    def note_float(self, path: str, reason: str) -> None:
        """Notes that a leaf is float32, and why."""
        self.floats.add(path)
        self.note(path, f"float32 ({reason})")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class HostWeight(StoredArray):
    """A leaf whose codes are integers and symmetric, as NumPy arrays: `codes * scale`.

    Static for JAX, so that it passes through every trace; scans are unrolled before.

    Attributes:
        path: of the leaf.
        codes: int8, less their zero points.
        scale: float32, of the shape of the codes (often a view that repeats entries).
        dtype: logical dtype.
        bits: 8 or 4.
        inputs: the quantizer of its inputs, if the leaf has one.
        rounded: whether the runtime rounds its inputs to 8 bits.
        sites: where uses are noted.
    """

    path: str
    codes: np.ndarray
    scale: np.ndarray
    dtype: Any
    bits: int
    inputs: Any
    rounded: bool
    sites: Sites

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return self.codes.shape

    @property
    def nbits(self) -> int:
        """Bits of the codes alone."""
        return self.bits * self.codes.size

    def values(self) -> np.ndarray:
        """The plain array."""
        return (self.codes.astype(np.float32) * self.scale).astype(self.dtype)

    def materialize(self) -> jax.Array:
        """The plain array, as a constant of the program."""
        self.sites.note_float(self.path, "no matmul, convolution or look-up reads it")
        return jnp.asarray(self.values())

    def transpose(self, permutation: Sequence[int]) -> Any:
        """The axes in another order."""
        return self._with(self.codes.transpose(permutation), self.scale.transpose(permutation))

    def reshape(self, shape: Sequence[int]) -> Any:
        """Another shape."""
        return self._with(self.codes.reshape(shape), self.scale.reshape(shape))

    def slice_axis(self, axis: int, start: Any, size: int) -> Any:
        """Entries along an axis, from a start that is known."""
        if not isinstance(start, int | np.integer):
            return None
        part = (slice(None),) * axis + (slice(int(start), int(start) + size),)
        return self._with(self.codes[part], self.scale[part])

    def cast(self, dtype: Any) -> Any:
        """Another logical dtype."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def take_rows(self, rows: Integer[Array, "..."]) -> Any:
        """`values()[rows]`, from codes of 8 or 4 bits."""
        codes, scale = (part.reshape(len(self.codes), -1) for part in (self.codes, self.scale))
        bits = self.bits if codes.shape[1] % 2 == 0 else 8
        self.sites.note(self.path, f"int{bits} look-up")
        if bits == 4:
            picked = _from_nibbles(_picked(nibbles(codes), rows).astype(jnp.float32))
        else:
            picked = _picked(codes, rows).astype(jnp.float32)
        steps = _row_steps(scale, rows)
        groups = picked.reshape(*rows.shape, steps.shape[-1], -1) * steps[..., None]
        return groups.reshape(*rows.shape, *self.shape[1:]).astype(self.dtype)

    def dot(self, other: jax.Array, side: int, parameters: Mapping[str, Any]) -> jax.Array:
        """A fully connected operation; batched products are those of plain arrays."""
        contracted, batch = parameters["dimension_numbers"]
        if batch[side]:
            self.sites.note_float(self.path, "LiteRT has no batched matmul with int8 weights")
            return self._plain_dot(other, side, parameters)
        free = [axis for axis in range(self.ndim) if axis not in contracted[side]]
        order, terms = [*free, *contracted[side]], math.prod(self.shape[axis] for axis in contracted[side])
        codes, scale = (part.transpose(order).reshape(-1, terms) for part in (self.codes, self.scale))
        steps, bits, form = _steps(codes, scale, self.bits, rounded=self.rounded)
        if steps is None:
            self.sites.note_float(self.path, form)
            return self._plain_dot(other, side, parameters)
        self._note_matmul(form)
        site = Site(kind="fully_connected", codes=codes, scale=steps, bits=bits, rounded=self.rounded)
        rows = [axis for axis in range(other.ndim) if axis not in contracted[1 - side]]
        shape = [other.shape[axis] for axis in rows]
        flat = other.transpose((*rows, *contracted[1 - side])).reshape(*(shape or [1]), terms)
        result = self.sites.call(site, flat, (*flat.shape[:-1], len(codes)))
        result = result.reshape(*shape, *(self.shape[axis] for axis in free))
        if side == 0:
            result = jnp.moveaxis(result, range(len(shape)), range(len(free), result.ndim))
        return result.astype(parameters["preferred_element_type"] or jnp.result_type(other.dtype, self.dtype))

    def convolve(self, inputs: jax.Array, parameters: Mapping[str, Any]) -> Any:
        """A convolution over one or two axes, dense or depthwise."""
        found = _convolution(self, inputs, parameters)
        if isinstance(found, str):
            self.sites.note_float(self.path, found)
            kernel = jnp.asarray(self.values())
            return jax.lax.conv_general_dilated_p.bind(self._rounded(inputs, parameters), kernel, **parameters)
        site, form, padding = found
        self._note_matmul(form)
        numbers = parameters["dimension_numbers"]
        x = jnp.transpose(inputs, (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]))
        if any(low or high for low, high in padding) and not site.same:
            x = jnp.pad(x, [(0, 0), *padding, (0, 0)])
        spatial = [inputs.shape[axis] for axis in numbers.lhs_spec[2:]]
        outputs = _outputs(self, spatial, parameters)
        if len(spatial) == 1:
            x, outputs = x[:, None], [1, *outputs]
        result = self.sites.call(site, x, (x.shape[0], *outputs, site.scale.shape[0]))
        if len(spatial) == 1:
            result = result[:, 0]
        places = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
        return jnp.transpose(result, np.argsort(places).tolist()).astype(inputs.dtype)

    def _with(self, codes: np.ndarray, scale: np.ndarray) -> "HostWeight":
        return dataclasses.replace(self, codes=codes, scale=scale)

    def _note_matmul(self, form: str) -> None:
        inputs = "inputs rounded to 8 bits" if self.rounded else "computed in float32"
        self.sites.note(self.path, f"{form}, {inputs}")

    def _plain_dot(self, other: jax.Array, side: int, parameters: Mapping[str, Any]) -> jax.Array:
        if self.inputs is not None:
            other = self.inputs.rounded(other, parameters["dimension_numbers"][0][1 - side], None, None)
        return product_with_plain(jnp.asarray(self.values()), other, side, parameters)

    def _rounded(self, inputs: jax.Array, parameters: Mapping[str, Any]) -> jax.Array:
        axes = (parameters["dimension_numbers"].lhs_spec[1],)
        return inputs if self.inputs is None else self.inputs.rounded(inputs, axes, None, None)


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Two int4 codes to a byte along the last axis, the first in the low half."""
    halves = np.ascontiguousarray(codes).view(np.uint8) & 15
    return halves[..., ::2] | halves[..., 1::2] << 4


def _from_nibbles(pairs: jax.Array) -> jax.Array:
    """The codes of bytes, in float32, which holds them exactly: the runtime has no int4 look-up for every scale."""
    upper = jnp.floor(pairs / 16)
    codes = jnp.stack([pairs - 16 * upper, upper], axis=-1)
    signed = codes - 16 * jnp.floor(codes / 8)
    return signed.reshape(*pairs.shape[:-1], -1)


def _picked(table: np.ndarray, rows: jax.Array) -> jax.Array:
    return jnp.asarray(table).at[rows].get(mode="promise_in_bounds")


def _row_steps(scale: np.ndarray, rows: jax.Array) -> jax.Array:
    """The scales of rows, one for each group of features that shares one."""
    changes = np.flatnonzero((scale[:, 1:] != scale[:, :-1]).any(axis=0)) + 1
    scale = np.ascontiguousarray(scale[:, :: math.gcd(scale.shape[1], *changes.tolist())])
    if (scale == scale[:1]).all():
        return jnp.asarray(scale[0]).reshape(*(1,) * rows.ndim, -1)
    return _picked(scale, rows)


def _steps(codes: np.ndarray, scale: np.ndarray, bits: int, *, rounded: bool) -> tuple[np.ndarray | None, int, str]:
    """The scales of (O, I) codes as the runtime holds them, its bits, and the form; or None, and why it cannot."""
    terms = codes.shape[1]
    # Two codes of an output to a byte.
    bits = 4 if bits == 4 and terms % 2 == 0 else 8
    if (scale == scale[:, :1]).all():
        steps = np.where(codes.any(axis=1), scale[:, 0], np.float32(1))  # the runtime refuses a scale of 0
        if not (np.isfinite(steps) & (steps >= np.finfo(np.float32).tiny)).all():
            return None, bits, "scales below float32's normal numbers"
        return steps.astype(np.float32), bits, f"int{bits} per-channel"
    changes = np.flatnonzero((scale[:, 1:] != scale[:, :-1]).any(axis=0)) + 1
    size = math.gcd(terms, *changes.tolist())
    if bits != 4 or size % 32:
        return None, bits, f"LiteRT has groups of 32, 64, ... int4 codes, not {size} of int{bits}"
    if not rounded:
        # Its dequantization makes zeros of them.
        return None, bits, "LiteRT has groups of int4 codes beside inputs of 8 bits alone"
    steps = scale[:, ::size]
    # The file has float16, and the runtime computes with bfloat16.
    stored = steps.astype(jnp.bfloat16).astype(np.float32)
    with np.errstate(over="ignore"):
        if not ((stored.astype(np.float16) == stored) & (stored > 0)).all():
            return None, bits, "scales of groups are outside of float16"
    exact = "" if (stored == steps).all() else ", scales rounded to bfloat16"
    return stored, bits, f"int4 g{size}{exact}"


def _convolution(
    kernel: HostWeight, inputs: jax.Array, parameters: Mapping[str, Any]
) -> tuple[Site, str, list[tuple[int, int]]] | str:
    """The site, its form and its padding; or why the kernel must be plain."""
    numbers, groups = parameters["dimension_numbers"], parameters["feature_group_count"]
    output, feature, *spatial = numbers.rhs_spec
    channels = inputs.shape[numbers.lhs_spec[1]]
    if len(spatial) not in (1, 2) or parameters["batch_group_count"] != 1 or set(parameters["lhs_dilation"]) != {1}:
        return "LiteRT has convolutions over one or two axes, not transposed"
    if groups not in (1, channels) or (groups == channels > 1 and kernel.shape[feature] != 1):
        return f"LiteRT has no convolutions of {groups} groups with int8 weights"
    codes, scale = (part.transpose((output, *spatial, feature)) for part in (kernel.codes, kernel.scale))
    count = codes.shape[0]
    steps, _, form = _steps(codes.reshape(count, -1), scale.reshape(count, -1), 8, rounded=kernel.rounded)
    if steps is None:
        return form
    if len(spatial) == 1:
        codes = codes[:, None]
    depthwise = groups > 1
    sizes, strides, dilation = codes.shape[1:3], parameters["window_strides"], parameters["rhs_dilation"]
    padding = [tuple(pair) for pair in parameters["padding"]]
    if any(value < 0 for pair in padding for value in pair):
        return "LiteRT has no negative padding"
    lengths = [inputs.shape[axis] for axis in numbers.lhs_spec[2:]]
    wanted = [_same(*each) for each in zip(lengths, sizes[-len(lengths) :], strides, dilation, strict=True)]
    site = Site(
        kind="depthwise" if depthwise else "conv",
        codes=codes.transpose(3, 1, 2, 0) if depthwise else codes,
        scale=steps,
        bits=8,
        rounded=kernel.rounded,
        strides=_both(strides),
        dilation=_both(dilation),
        same=padding == wanted,
        multiplier=count // channels if depthwise else 1,
    )
    return site, form, padding


def _both(numbers: Sequence[int]) -> tuple[int, int]:
    """Of height and width, the first of which may be missing."""
    return (1 if len(numbers) == 1 else numbers[0]), numbers[-1]


def _same(length: int, size: int, stride: int, dilation: int) -> tuple[int, int]:
    """What TensorFlow's `SAME` puts before and after."""
    total = max((-(-length // stride) - 1) * stride + (size - 1) * dilation + 1 - length, 0)
    return total // 2, total - total // 2


def _outputs(kernel: HostWeight, spatial: Sequence[int], parameters: Mapping[str, Any]) -> list[int]:
    sizes = [kernel.shape[axis] for axis in parameters["dimension_numbers"].rhs_spec[2:]]
    each = zip(
        spatial, sizes, parameters["window_strides"], parameters["rhs_dilation"], parameters["padding"], strict=True
    )
    return [(n + low + high - (k - 1) * d - 1) // stride + 1 for n, k, stride, d, (low, high) in each]
