"""Text from a decoder, token by token.

Shape letters: B rows, L tokens of the prompts, N new tokens, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxcompress._src.execution.execute import execute
from jaxcompress._src.models.decoder.cache import init_cache
from jaxcompress._src.types import Params


class Generated(NamedTuple):
    """What `generate` gives.

    Attributes:
        tokens: int32 (B, N), the new tokens; `pad_token` behind the end.
        lengths: int32 (B,), how many there are in each row, a stop token included.
    """

    tokens: jax.Array
    lengths: jax.Array


@dataclasses.dataclass(frozen=True)
class _Sampling:
    """The options of `generate` that a program is compiled for."""

    most: int
    temperature: float
    top_k: int | None
    top_p: float | None
    stop_tokens: tuple[int, ...]
    pad_token: int
    cache_bits: int | None


def generate(
    module: nn.Module,
    params: Params,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    pad_token: int = 0,
    cache_bits: int | None = None,
    key: jax.Array | None = None,
) -> Generated:
    """Continues prompts with a causal language model, whose leaves may be compressed.

    The prompts are read at once, then one token after another, with a cache of keys and values. Compiled once for each
    shape of the prompts and each choice of options. A new token is the most probable one, or drawn from
    softmax(logits / `temperature`), restricted to the `top_k` most probable and then to the fewest whose probabilities
    sum to `top_p` or more.

    Args:
        module: a causal language model of `jaxcompress.models`, such as `from_pretrained` gives.
        params: its parameters, plain or compressed.
        input_ids: (B, L), the prompts.
        attention_mask: (B, L), above 0 where there is a token; padding may be on either side. All tokens, if not given.
        max_new_tokens: N, at least 1.
        temperature: 0: the most probable token; of equal ones the first.
        top_k: at least 1; None: all.
        top_p: in (0, 1]; None: all.
        stop_tokens: a row ends with any of these; when all rows have ended, nothing more is computed.
        pad_token: stands behind the end of a row.
        cache_bits: 8: keys and values are kept as int8; None: in the dtype of the module. See `init_cache`.
        key: for drawing; needed where `temperature` is above 0.

    Returns:
        The new tokens, without the prompts, and how many of them each row has.

    Raises:
        ValueError: options out of range; a row without a token, or with one that is not in the vocabulary; more tokens,
            prompt and continuation together, than the model has positions; or a module that is no causal language
            model.

    Example:
        >>> from jaxcompress.models import LlamaConfig, make_module
        >>> module = make_module(
        ...     LlamaConfig(
        ...         vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
        ...     )
        ... )
        >>> prompts = jnp.array([[2, 7, 9], [5, 3, 0]])
        >>> params = jax.jit(module.init)(jax.random.key(0), prompts)["params"]
        >>> mask = jnp.array([[1, 1, 1], [1, 1, 0]])
        >>> tokens, lengths = generate(module, params, prompts, mask, max_new_tokens=4)
        >>> tokens.shape, lengths.tolist()
        ((2, 4), [4, 4])

    References:
        Holtzman et al. 2020, "The curious case of neural text degeneration" (top-p); Fan et al. 2018, "Hierarchical
        neural story generation" (top-k).
    """
    sampling = _Sampling(max_new_tokens, temperature, top_k, top_p, tuple(stop_tokens), pad_token, cache_bits)
    _check_options(sampling, key)
    config: Any = getattr(module, "config", None)
    if getattr(config, "head", None) != "causal_lm":
        raise ValueError(f"`generate` needs a causal language model of `jaxcompress.models`, got {module!r:.80}.")
    if unknown := [token for token in sampling.stop_tokens if not 0 <= token < config.vocab_size]:
        raise ValueError(f"`stop_tokens` has the token {unknown[0]}; `vocab_size` is {config.vocab_size}.")
    ids, mask = _checked_prompts(input_ids, attention_mask, config, max_new_tokens)
    return Generated(*_generated(module, params, ids, mask, jax.random.key(0) if key is None else key, sampling))


@functools.partial(jax.jit, static_argnames=("module", "sampling"))
def _generated(
    module: Any, params: Params, ids: jax.Array, mask: jax.Array, key: jax.Array, sampling: _Sampling
) -> tuple[jax.Array, jax.Array]:
    ids, mask = _flushed_right(ids, mask)
    room = ids.shape[-1] + sampling.most
    cache = init_cache(module.config, ids.shape[0], room, bits=sampling.cache_bits, dtype=module.dtype)

    @execute
    def read(params: Params, ids: jax.Array, mask: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        outputs = module.apply({"params": params}, ids, mask, cache=cache, logits="last")
        return outputs["logits"][:, 0], outputs["cache"]

    def unfinished(state: Any) -> jax.Array:
        number, *_, ended, _ = state
        return (number < sampling.most) & ~ended.all()

    def step(state: Any) -> Any:
        number, logits, cache, tokens, ended, lengths = state
        token = _drawn(logits, jax.random.fold_in(key, number), sampling)
        token = jnp.where(ended, sampling.pad_token, token)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], number, 1)
        lengths = lengths + ~ended
        for stop in sampling.stop_tokens:
            ended = ended | (token == stop)
        logits, cache = read(params, token[:, None], jnp.ones((len(token), 1), jnp.int32), cache)
        return number + 1, logits, cache, tokens, ended, lengths

    rows = ids.shape[0]
    logits, cache = read(params, ids, mask, cache)
    tokens = jnp.full((rows, sampling.most), sampling.pad_token, jnp.int32)
    state = (jnp.int32(0), logits, cache, tokens, jnp.zeros(rows, bool), jnp.zeros(rows, jnp.int32))
    *_, tokens, _, lengths = jax.lax.while_loop(unfinished, step, state)
    return tokens, lengths


def _drawn(logits: jax.Array, key: jax.Array, sampling: _Sampling) -> jax.Array:
    """A token of each row, int32 (B,), given logits (B, V)."""
    logits = logits.astype(jnp.float32)
    if sampling.temperature == 0:
        return logits.argmax(axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, _restricted(logits / sampling.temperature, sampling)).astype(jnp.int32)


def _restricted(logits: jax.Array, sampling: _Sampling) -> jax.Array:
    """The logits, -inf where a token is not to be drawn."""
    if sampling.top_k is None and sampling.top_p is None:
        return logits
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    if sampling.top_k is not None:
        ranked = jnp.where(jnp.arange(ranked.shape[-1])[None] < sampling.top_k, ranked, -jnp.inf)
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        ranked = jnp.where(before < sampling.top_p, ranked, -jnp.inf)
    return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)


def _flushed_right(ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Prompts with their padding on the left, so that all of them go on at the same place."""
    present = mask > 0
    # Stable: padding first, tokens in their order.
    order = jnp.argsort(present, axis=-1, stable=True)
    return jnp.take_along_axis(ids, order, axis=-1), jnp.take_along_axis(present, order, axis=-1).astype(jnp.int32)


def _check_options(sampling: _Sampling, key: jax.Array | None) -> None:
    if sampling.most < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, got {sampling.most}.")
    if not sampling.temperature >= 0:
        raise ValueError(f"`temperature` must be at least 0, got {sampling.temperature}.")
    if sampling.temperature > 0 and key is None:
        raise ValueError("Drawing tokens (`temperature` above 0) needs `key`.")
    if sampling.top_k is not None and sampling.top_k < 1:
        raise ValueError(f"`top_k` must be at least 1, got {sampling.top_k}.")
    if sampling.top_p is not None and not 0 < sampling.top_p <= 1:
        raise ValueError(f"`top_p` must be in (0, 1], got {sampling.top_p}.")
    if sampling.temperature == 0 and (sampling.top_k is not None or sampling.top_p is not None):
        raise ValueError("`top_k` and `top_p` restrict what is drawn: give a `temperature` above 0.")


def _checked_prompts(
    input_ids: ArrayLike, attention_mask: ArrayLike | None, config: Any, most: int
) -> tuple[np.ndarray, np.ndarray]:
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"`input_ids` must be integers (rows, tokens), got {ids.dtype}{list(ids.shape)}.")
    mask = np.ones(ids.shape, np.int32) if attention_mask is None else np.asarray(attention_mask)
    if mask.shape != ids.shape:
        raise ValueError(f"`attention_mask` must have the shape of `input_ids`, {ids.shape}, got {mask.shape}.")
    if not (mask > 0).any(axis=1).all():
        raise ValueError(f"Row {int((mask > 0).any(axis=1).argmin())} of `input_ids` has no token.")
    tokens = ids[mask > 0]
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        wrong = tokens.min() if tokens.min() < 0 else tokens.max()
        raise ValueError(f"`input_ids` has the token {wrong}; `vocab_size` is {config.vocab_size}.")
    if ids.shape[1] + most > config.max_position_embeddings:
        raise ValueError(
            f"{ids.shape[1]} tokens of the prompts and {most} new ones are more than the "
            f"{config.max_position_embeddings} positions of the model."
        )
    return ids.astype(np.int32), (mask > 0).astype(np.int32)
