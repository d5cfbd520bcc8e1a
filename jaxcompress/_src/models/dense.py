"""Dense layers and tied decoders over several leading axes, multiplied as one matrix.

Shape letters: B leading axes (a batch, usually), L tokens, D features.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class RowMatmul:
    """`jax.lax.dot_general` for the `dot_general` of dense layers: of (B..., L, D) and a kernel (D, features).

    The gradient of a kernel sums over all leading axes. Over more than one, XLA on a CPU turns an operand around and
    multiplies it as it then lies: three times slower than over one axis of rows (53 ms against 18 for 32 x 64 tokens
    and a kernel of 384 x 1536, one core; jax 0.10.2). So they become one there. Other backends see the axes as they
    are: tokens that lie on several devices would have to move. What layers take and return, which taps and interceptors
    see, has all of its axes on every backend.

    Layers that read the same value (query, key, value) share one of these: their matrix is then the same, too, in which
    calibration finds their common input.
    """

    def __init__(self) -> None:
        """Has read nothing."""
        self._read: jax.Array | None = None
        self._rows: jax.Array | None = None

    def __call__(self, hidden: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
        """The product; `dimension_numbers` contract the last axis with the first one."""
        leading = hidden.shape[:-1]
        if len(leading) < 2 or jax.default_backend() != "cpu" or any(jax.typeof(hidden).sharding.spec[1:-1]):
            return jax.lax.dot_general(hidden, kernel, dimension_numbers, **options)
        if self._rows is None or self._read is not hidden:
            self._read, self._rows = hidden, hidden.reshape(math.prod(leading), hidden.shape[-1])
        product = jax.lax.dot_general(self._rows, kernel, (((1,), (0,)), ((), ())), **options)
        return product.reshape(*leading, kernel.shape[1])


def dense(
    features: int,
    config: Any,
    dtype: Any,
    *,
    name: str | None = None,
    use_bias: bool = True,
    matmul: RowMatmul | None = None,
) -> nn.Dense:
    """A dense layer with the initialisation of a config, which, unlike Flax's default, accepts 0 inputs.

    Args:
        features: of its outputs.
        config: of a model; its `initializer_range` is the standard deviation.
        dtype: of the computation.
        name: of the module.
        use_bias: whether it adds one.
        matmul: shared with the layers that read the same value.
    """
    init = nn.initializers.normal(config.initializer_range)
    matmul = RowMatmul() if matmul is None else matmul
    return nn.Dense(features, use_bias=use_bias, dtype=dtype, kernel_init=init, dot_general=matmul, name=name)


class TiedEmbed(nn.Embed):
    """An embedding that also decodes: (B..., L, D) to (B..., L, num_embeddings)."""

    def attend(self, query: jax.Array) -> jax.Array:
        """The product with every row of the table."""
        promote: Callable[..., Any] = self.promote_dtype
        hidden, table = promote(query, self.embedding, dtype=self.dtype)
        return RowMatmul()(hidden, jnp.transpose(table), (((hidden.ndim - 1,), (0,)), ((), ())))
