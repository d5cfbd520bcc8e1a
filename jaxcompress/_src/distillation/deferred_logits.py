"""Logits of large vocabularies that never exist in full: losses compute them a block of classes at a time.

Blocks of classes, not of positions: the gradient of the head is then written once, block by block, instead of being
added up over its whole size, and positions that are spread over devices stay there, without a sum over devices at every
turn of the loop. Shape letters: n examples, positions; d features; c classes; k classes that are looked up.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jaxcompress._src.distillation.divergences import Divergence, class_divergence, cross_entropy
from jaxcompress._src.distillation.outputs import Outputs, as_float32, named, zero_masked
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.types import CompressedArray, plain

_Carry = TypeVar("_Carry")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("hidden", "kernel", "bias"),
    meta_fields=("tied", "block_size", "scale"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DeferredLogits:
    """What logits are made of: scale · (hidden @ kernel + bias); made by `deferred_logits`.

    Attributes:
        hidden: (*n, d).
        kernel: (d, c), or (c, d) if it is tied.
        bias: (c,), or None.
        tied: whether the kernel is a table of embeddings.
        block_size: classes that are computed at a time.
        scale: 1 / temperature.
    """

    hidden: Any
    kernel: Any
    bias: Any
    tied: bool
    block_size: int
    scale: float = 1.0

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.kernel.shape[0 if self.tied else 1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logits."""
        return (*self.hidden.shape[:-1], self.classes)

    def __jax_array__(self) -> jax.Array:
        """Raises an error: what needs an array would compute all logits."""
        raise TypeError(
            "Deferred logits are no array. What takes them: `soft_targets`, `hard_labels`, `next_token_labels`, "
            "`top_k_targets` and `argmax_agreement`."
        )

    @property
    def dtype(self) -> Any:
        """That of the arithmetic: float32 at least."""
        return jnp.promote_types(jnp.result_type(self.hidden, self.kernel), jnp.float32)


Logits: TypeAlias = jax.Array | DeferredLogits
"""Logits in full, or deferred."""


def deferred_logits(
    hidden: Float[Array, "*n d"],
    kernel: Float[Array, "_ _"] | CompressedArray,
    bias: Float[ArrayLike, " c"] | None = None,
    *,
    tied: bool = False,
    block_size: int = 512,
) -> DeferredLogits:
    """The logits `hidden @ kernel + bias`, to be returned by an `apply` in the place of logits that would be too large.

    `soft_targets`, `hard_labels`, `next_token_labels`, `top_k_targets` and `argmax_agreement` take them as they take
    logits, of the student, the teacher or both. They compute a block of classes at a time, forward and backward, so
    that memory beyond hidden states and head is that of a few blocks, positions x `block_size`, and the head is
    multiplied twice more. Values and gradients, by hidden states and head, are those of the logits in full. The default
    metric of a train step, the agreement, is one more forward pass over the head: `metrics={}` leaves it out.

    Args:
        hidden: the states before the head, (batch, positions, features) or (batch, features), any float dtype; products
            are summed in float32.
        kernel: the head, (features, classes). Of a compressed leaf, the plain array is made, once.
        bias: (classes,), or None.
        tied: whether the kernel is the table of the embeddings, (classes, features).
        block_size: classes at a time. For 4 x 512 positions, 512 classes are 4 MB.

    Returns:
        A node that losses understand. It is no array: a loss on logits that is not named here raises an error.

    Raises:
        ValueError: shapes that do not fit, or `block_size` below 1.

    Example:
        A student and a teacher whose logits are never there as a whole:

        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxcompress.distillation import deferred_logits, make_train_step, next_token_labels, soft_targets
        >>> def apply(params, batch, *, key, train):
        ...     hidden = jnp.tanh(params["table"][batch["input_ids"]])
        ...     return {"logits": deferred_logits(hidden, params["table"], tied=True, block_size=16)}
        >>> losses = {"soft": soft_targets(mask=None), "hard": (0.1, next_token_labels(mask=None))}
        >>> init_state, step = make_train_step(apply, apply, optax.adam(1e-2), losses=losses)
        >>> student, teacher = ({"table": jax.random.normal(jax.random.key(i), (50, 8))} for i in range(2))
        >>> state = init_state(student, key=jax.random.key(2))
        >>> batch = {"input_ids": jnp.arange(12).reshape(2, 6)}
        >>> figures = []
        >>> for _ in range(20):
        ...     state, metrics = step(state, teacher, batch)
        ...     figures.append(float(metrics["soft"][0] / metrics["soft"][1]))
        >>> figures[-1] < 0.8 * figures[0]
        True

    References:
        Wijmans et al. 2025, "Cut your losses in large-vocabulary language models" (cross entropy by blocks of classes).
    """
    if block_size < 1:
        raise ValueError(f"`block_size` must be at least 1, got {block_size}.")
    hidden, kernel = jnp.asarray(hidden), jnp.asarray(plain(kernel))
    classes, features = kernel.shape if tied else kernel.shape[::-1]
    if features != hidden.shape[-1]:
        expected = f"(classes, {hidden.shape[-1]})" if tied else f"({hidden.shape[-1]}, classes)"
        raise ValueError(
            f"`kernel` must have shape {expected} to fit hidden states {hidden.shape}, with `tied={tied}`, got "
            f"{kernel.shape}."
        )
    if bias is not None and jnp.shape(bias) != (classes,):
        raise ValueError(f"`bias` must have shape ({classes},), got {jnp.shape(bias)}.")
    bias = None if bias is None else jnp.asarray(bias)
    return DeferredLogits(hidden=hidden, kernel=kernel, bias=bias, tied=tied, block_size=min(block_size, classes))


def logits_pair(student: Outputs, teacher: Outputs, name: str) -> tuple[Logits, Logits]:
    """The logits of both models, of equal shape: deferred, or arrays in float32 at least.

    Raises:
        ValueError: one of them lacks it, or the shapes differ.
    """
    s, t = logits_of(student, name, "student"), logits_of(teacher, name, "teacher")
    if s.shape != t.shape:
        raise ValueError(f"{name!r} has shape {s.shape} in the student and {t.shape} in the teacher.")
    return s, t


def logits_of(outputs: Outputs, name: str, owner: str) -> Logits:
    """The logits of one model.

    Raises:
        ValueError: there are none.
    """
    logits = named(outputs, name, owner)
    return logits if isinstance(logits, DeferredLogits) else as_float32(logits)


def without_masked(logits: Logits, mask: Bool[Array, "*n"]) -> Logits:
    """Logits of zeros, or out of zeros, where the mask is not set."""
    if isinstance(logits, DeferredLogits):
        return dataclasses.replace(logits, hidden=zero_masked(logits.hidden, mask))
    return zero_masked(logits, mask)


def softened(logits: Logits, temperature: float) -> Logits:
    """Logits divided by a temperature."""
    if isinstance(logits, DeferredLogits):
        return dataclasses.replace(logits, scale=logits.scale / temperature)
    return logits / temperature


def logits_divergence(student: Logits, teacher: Logits, divergence: Divergence) -> Float[Array, "*n"]:
    """`class_divergence` of logits that may be deferred; if the student's are, without a gradient for the teacher."""
    if isinstance(student, DeferredLogits):
        return on_auto_axes(functools.partial(_divergence, divergence))(student, jax.lax.stop_gradient(teacher))
    # The student's logits are there in full, so that the teacher's may be, too.
    return class_divergence(student, _all_columns(teacher), divergence)


def logits_cross_entropy(logits: Logits, labels: Int[Array, "*n"], *, smoothing: float) -> Float[Array, "*n"]:
    """`cross_entropy` of logits that may be deferred."""
    if not isinstance(logits, DeferredLogits):
        return cross_entropy(logits, labels, smoothing=smoothing)
    picked, others, total = looked_up(logits, labels[..., None])
    normalizer = jnp.logaddexp(picked[..., 0], others)
    hit = normalizer - picked[..., 0]
    return (1.0 - smoothing) * hit + smoothing * (normalizer - total / logits.classes) if smoothing else hit


def logits_argmax(logits: Logits) -> Int[Array, "*n"]:
    """The class of the largest logit, the first one of several; of logits that may be deferred."""
    return on_auto_axes(_argmax)(logits) if isinstance(logits, DeferredLogits) else logits.argmax(axis=-1)


def logits_top_k(logits: Logits, k: int) -> tuple[Float[Array, "*n k"], Int[Array, "*n k"]]:
    """The largest logits, and their classes, in descending order; of logits that may be deferred, no gradient."""
    if isinstance(logits, DeferredLogits):
        return on_auto_axes(functools.partial(_top_k, k))(logits)
    values, classes = jax.lax.top_k(logits, k)
    return values, classes


def looked_up(
    logits: Logits, classes: Int[Array, "*n k"]
) -> tuple[Float[Array, "*n k"], Float[Array, "*n"], Float[Array, "*n"]]:
    """The logits of some classes, the logarithm of the sum of exp(logit) over all others, and the sum of all logits.

    Args:
        logits: may be deferred.
        classes: different ones at each position; those outside of the vocabulary give NaN.
    """
    known = (classes >= 0) & (classes < logits.shape[-1])
    look_up: Callable[..., Any] = _looked_up if isinstance(logits, DeferredLogits) else _looked_up_in_full
    picked, others, total = on_auto_axes(look_up)(logits, classes)
    return jnp.where(known, picked, jnp.nan), others, total


class _Block(NamedTuple):
    """A block of classes; the last one may begin within the one before.

    Attributes:
        start: the first class, a scalar.
        is_new: (block_size,), which of them no block before had.
    """

    start: jax.Array
    is_new: jax.Array


def _over_blocks(logits: DeferredLogits, init: _Carry, body: Callable[[_Carry, _Block], _Carry]) -> _Carry:
    size, classes = logits.block_size, logits.classes

    def step(number: jax.Array, carry: _Carry) -> _Carry:
        start = jnp.minimum(number * size, classes - size)
        return body(carry, _Block(start, start + jnp.arange(size) >= number * size))

    return jax.lax.fori_loop(0, -(-classes // size), step, init)


def _all_columns(logits: Logits) -> jax.Array:
    return _columns(logits, 0, logits.classes) if isinstance(logits, DeferredLogits) else logits


def _columns(logits: Logits, start: Any, size: int) -> jax.Array:
    """The logits of the classes from `start` on, (*n, size)."""
    if not isinstance(logits, DeferredLogits):
        return jax.lax.dynamic_slice_in_dim(logits, start, size, axis=-1)
    hidden, kernel = _operands(logits, start, size)
    axes = ((hidden.ndim - 1,), (1 if logits.tied else 0,)), ((), ())
    columns = jax.lax.dot_general(hidden, kernel, axes, preferred_element_type=logits.dtype)
    if logits.bias is not None:
        bias = jax.lax.dynamic_slice_in_dim(logits.bias, start, size).astype(columns.dtype)
        columns = columns + jnp.expand_dims(bias, range(columns.ndim - 1))
    return columns * logits.scale


def _operands(logits: DeferredLogits, start: Any, size: int) -> tuple[jax.Array, jax.Array]:
    """The hidden states, and a block of the head, in one dtype."""
    kernel = jax.lax.dynamic_slice_in_dim(logits.kernel, start, size, axis=0 if logits.tied else 1)
    dtype = jnp.result_type(logits.hidden, kernel)
    return logits.hidden.astype(dtype), kernel.astype(dtype)


def _gradient(logits: DeferredLogits, of_columns: Callable[[jax.Array], jax.Array]) -> DeferredLogits:
    """The cotangents of hidden states and head.

    Args:
        logits: deferred.
        of_columns: `start -> ` cotangent of a block of logits, (*n, block_size).
    """
    size, rows = logits.block_size, tuple(range(logits.hidden.ndim - 1))

    def body(carry: tuple[Any, Any, Any], block: _Block) -> tuple[Any, Any, Any]:
        of_hidden, of_kernel, of_bias = carry
        columns = of_columns(block.start) * logits.scale
        hidden, kernel = _operands(logits, block.start, size)
        new = jnp.where(jnp.expand_dims(block.is_new, rows), columns, 0.0).astype(hidden.dtype)
        dot = functools.partial(jax.lax.dot_general, preferred_element_type=logits.dtype)
        of_hidden = of_hidden + dot(new, kernel, (((len(rows),), (0 if logits.tied else 1,)), ((), ())))
        pair = (columns.astype(hidden.dtype), hidden) if logits.tied else (hidden, columns.astype(hidden.dtype))
        part = dot(*pair, ((rows, rows), ((), ()))).astype(of_kernel.dtype)
        # Not only of the new classes: the others are written again, as they were.
        of_kernel = jax.lax.dynamic_update_slice_in_dim(of_kernel, part, block.start, 0 if logits.tied else 1)
        if of_bias is not None:
            part = columns.sum(axis=rows).astype(of_bias.dtype)
            of_bias = jax.lax.dynamic_update_slice_in_dim(of_bias, part, block.start, 0)
        return of_hidden, of_kernel, of_bias

    zeros = jax.tree.map(jnp.zeros_like, (logits.hidden.astype(logits.dtype), logits.kernel, logits.bias))
    of_hidden, of_kernel, of_bias = _over_blocks(logits, zeros, body)
    of_hidden = of_hidden.astype(logits.hidden.dtype)
    return dataclasses.replace(logits, hidden=of_hidden, kernel=of_kernel, bias=of_bias)


def _argmax(logits: DeferredLogits) -> jax.Array:
    def body(carry: tuple[jax.Array, jax.Array], block: _Block) -> tuple[jax.Array, jax.Array]:
        columns = _columns(logits, block.start, logits.block_size)
        largest = columns.max(axis=-1)
        better = largest > carry[0]
        return jnp.where(better, largest, carry[0]), jnp.where(better, block.start + columns.argmax(axis=-1), carry[1])

    rows = jnp.zeros_like(logits.hidden[..., 0], logits.dtype)
    return _over_blocks(logits, (rows - jnp.inf, jnp.zeros_like(rows, jnp.int32)), body)[1]


def _top_k(k: int, logits: DeferredLogits) -> tuple[jax.Array, jax.Array]:
    def body(carry: tuple[jax.Array, jax.Array], block: _Block) -> tuple[jax.Array, jax.Array]:
        columns = _columns(logits, block.start, logits.block_size)
        columns = jnp.where(_beside(block.is_new, columns), columns, -jnp.inf)
        numbers = jnp.broadcast_to(block.start + jnp.arange(logits.block_size), columns.shape)
        # The ones before come first: of equal logits, `top_k` takes the first.
        values, places = jax.lax.top_k(jnp.concatenate([carry[0], columns], axis=-1), k)
        return values, jnp.take_along_axis(jnp.concatenate([carry[1], numbers], axis=-1), places, axis=-1)

    none = jnp.repeat(jnp.full_like(logits.hidden[..., :1], -jnp.inf, logits.dtype), k, axis=-1)
    return _over_blocks(logits, (none, jnp.zeros_like(none, jnp.int32)), body)


def _no_exponentials(logits: DeferredLogits) -> tuple[jax.Array, jax.Array]:
    """Where a sum of exp(logit) begins: (largest logit, sum relative to it)."""
    rows = jnp.zeros_like(logits.hidden[..., 0], logits.dtype)
    # Not -inf, which has no difference from itself.
    return rows + jnp.finfo(logits.dtype).min, rows


def _with_exponentials(sums: tuple[jax.Array, jax.Array], columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    largest = jnp.maximum(sums[0], columns.max(axis=-1))
    return largest, sums[1] * jnp.exp(sums[0] - largest) + jnp.exp(columns - largest[..., None]).sum(axis=-1)


def _log(sums: tuple[jax.Array, jax.Array]) -> jax.Array:
    return sums[0] + jnp.log(sums[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(divergence: Divergence, student: DeferredLogits, teacher: Logits) -> jax.Array:
    return _divergence_forward(divergence, student, teacher)[0]


def _divergence_forward(divergence: Divergence, student: DeferredLogits, teacher: Logits) -> tuple[jax.Array, Any]:
    size = student.block_size

    def normalize(carry: Any, block: _Block) -> Any:
        columns = (_columns(logits, block.start, size) for logits in (student, teacher))
        columns = (jnp.where(_beside(block.is_new, each), each, -jnp.inf) for each in columns)
        return [_with_exponentials(sums, each) for sums, each in zip(carry, columns, strict=True)]

    normalizers = tuple(map(_log, _over_blocks(student, [_no_exponentials(student)] * 2, normalize)))

    def compare(carry: Any, block: _Block) -> Any:
        _, terms, slopes = _compared(divergence, student, teacher, normalizers, block.start)
        sums = (jnp.where(_beside(block.is_new, each), each, 0.0).sum(axis=-1) for each in (terms, slopes))
        return [total + part for total, part in zip(carry, sums, strict=True)]

    zeros = jnp.zeros_like(normalizers[0])
    value, slope = _over_blocks(student, [zeros, zeros], compare)
    return value, (student, teacher, normalizers, slope)


def _divergence_backward(divergence: Divergence, residuals: Any, cotangent: jax.Array) -> tuple[DeferredLogits, Any]:
    student, teacher, normalizers, slope = residuals

    def of_columns(start: jax.Array) -> jax.Array:
        log_q, _, slopes = _compared(divergence, student, teacher, normalizers, start)
        # log_q is the logit less the normalizer, which depends on all logits by their probabilities.
        return cotangent[..., None] * (slopes - jnp.exp(log_q) * slope[..., None])

    return _gradient(student, of_columns), None


def _compared(
    divergence: Divergence, student: DeferredLogits, teacher: Logits, normalizers: Any, start: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of a block: the student's log probabilities, the terms of the divergence, their derivatives by the former."""
    log_q, log_p = (
        _columns(logits, start, student.block_size) - normalizer[..., None]
        for logits, normalizer in zip((student, teacher), normalizers, strict=True)
    )
    terms, pull = jax.vjp(lambda log_q: divergence(log_q, log_p), log_q)
    return log_q, terms, pull(jnp.ones_like(terms))[0]


_divergence.defvjp(_divergence_forward, _divergence_backward)


@jax.custom_vjp
def _looked_up(logits: DeferredLogits, classes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return _looked_up_forward(logits, classes)[0]


def _looked_up_forward(logits: DeferredLogits, classes: jax.Array) -> tuple[Any, Any]:
    def body(carry: Any, block: _Block) -> Any:
        picked, sums, total = carry
        columns = _columns(logits, block.start, logits.block_size)
        is_new = _beside(block.is_new, columns)
        inside, places = _places(classes, block.start, logits.block_size)
        others = jnp.where(is_new, _without(columns, inside, places), -jnp.inf)
        picked = jnp.where(inside, jnp.take_along_axis(columns, places, axis=-1), picked)
        return picked, _with_exponentials(sums, others), total + jnp.where(is_new, columns, 0.0).sum(axis=-1)

    sums = _no_exponentials(logits)
    picked, sums, total = _over_blocks(logits, (jnp.zeros_like(classes, logits.dtype), sums, sums[1]), body)
    return (picked, _log(sums), total), (logits, classes, _log(sums))


def _looked_up_backward(residuals: Any, cotangents: Any) -> tuple[DeferredLogits, None]:
    logits, classes, normalizer = residuals
    of_picked, of_others, of_total = cotangents

    def of_columns(start: jax.Array) -> jax.Array:
        columns = _columns(logits, start, logits.block_size)
        inside, places = _places(classes, start, logits.block_size)
        _, pull = jax.vjp(lambda columns: jnp.take_along_axis(columns, places, axis=-1), columns)
        others = _without(columns, inside, places)
        # Where all classes were looked up, the normalizer is -inf, too.
        shares = jnp.where(others == -jnp.inf, 0.0, jnp.exp(others - normalizer[..., None]))
        of_columns = of_others[..., None] * shares + pull(jnp.where(inside, of_picked, 0.0))[0]
        return of_columns + of_total[..., None]

    return _gradient(logits, of_columns), None


_looked_up.defvjp(_looked_up_forward, _looked_up_backward)


def _looked_up_in_full(logits: jax.Array, classes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    inside, places = _places(classes, jnp.int32(0), logits.shape[-1])
    total = logits.sum(axis=-1)
    # Of no logits, logsumexp has no derivative.
    others = (
        jax.nn.logsumexp(_without(logits, inside, places), axis=-1)
        if classes.shape[-1] < logits.shape[-1]
        else jnp.full_like(total, -jnp.inf)
    )
    return jnp.take_along_axis(logits, places, axis=-1), others, total


def _places(classes: jax.Array, start: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Which classes are in a block, and where in it."""
    places = classes - start
    return (places >= 0) & (places < size), jnp.clip(places, 0, size - 1)


def _without(columns: jax.Array, inside: jax.Array, places: jax.Array) -> jax.Array:
    """The logits with -inf in some places."""
    beyond = jnp.where(inside, places, columns.shape[-1])
    return jnp.put_along_axis(columns, beyond, -jnp.inf, axis=-1, inplace=False, mode="drop")


def _beside(is_new: Bool[Array, " c"], columns: Float[Array, "*n c"]) -> Bool[Array, "*_ c"]:
    return jnp.expand_dims(is_new, range(columns.ndim - 1))
