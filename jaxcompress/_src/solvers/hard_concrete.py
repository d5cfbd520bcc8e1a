"""The hard concrete distribution: numbers in [0, 1] that are exactly 0 or 1 with a probability that has a gradient.

With u uniform in (0, 1), s = sigmoid((logit(u) + log alpha) / beta) is stretched to (gamma, zeta), then clipped to
[0, 1].
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxcompress._src.solvers.rank import keep_largest

Estimator = Literal["louizos", "topk"]
"""What a gate is without noise; see `deterministic_gates`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardConcrete:
    """Constants of the distribution.

    Attributes:
        gamma: lower end of the stretched range, negative: the mass below 0 becomes exact zeros.
        zeta: upper end, greater than 1.
        beta: temperature.
        epsilon: noise stays in [epsilon, 1 - epsilon], and so do probabilities.

    Raises:
        ValueError: a constant outside its range.
    """

    gamma: float = -0.1
    zeta: float = 1.1
    beta: float = 2 / 3
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        """Checks the constants."""
        if not self.gamma < 0:
            raise ValueError(f"`gamma` must be negative, got {self.gamma}.")
        if not self.zeta > 1:
            raise ValueError(f"`zeta` must be greater than 1, got {self.zeta}.")
        if not self.beta > 0:
            raise ValueError(f"`beta` must be positive, got {self.beta}.")
        if not 0 < self.epsilon < 0.5:
            raise ValueError(f"`epsilon` must be in (0, 0.5), got {self.epsilon}.")


STANDARD = HardConcrete()
"""The constants of Louizos et al., which CoFi and LLM-Shearing share."""


def quantile(
    probability: Float[Array, "*units"], log_alpha: Float[Array, "*units"], *, distribution: HardConcrete = STANDARD
) -> Float[Array, "*units"]:
    """z(u) = clip(sigmoid((log u - log(1 - u) + log alpha) / beta) (zeta - gamma) + gamma, 0, 1).

    Of uniform noise it is a sample.

    Args:
        probability: u; brought into [epsilon, 1 - epsilon].
        log_alpha: location of each gate.
        distribution: constants.

    Example:
        >>> quantile(jnp.array([0.01, 0.5, 0.99]), jnp.zeros(3))
        Array([0. , 0.5, 1. ], dtype=float32)

    References:
        Louizos, Welling and Kingma 2018, "Learning sparse neural networks through L0 regularization", equations 10, 11.
    """
    u = jnp.clip(probability, distribution.epsilon, 1 - distribution.epsilon)
    s = jax.nn.sigmoid((jnp.log(u) - jnp.log1p(-u) + log_alpha) / distribution.beta)
    return _stretch(s, distribution)


def sample_gates(
    key: jax.Array, log_alpha: Float[Array, "*units"], *, distribution: HardConcrete = STANDARD
) -> Float[Array, "*units"]:
    """One independent sample for each gate; differentiable in `log_alpha`."""
    uniform = jax.random.uniform(key, log_alpha.shape, log_alpha.dtype)
    return quantile(uniform, log_alpha, distribution=distribution)


def cumulative(
    x: Float[Array, "*units"], log_alpha: Float[Array, "*units"], *, distribution: HardConcrete = STANDARD
) -> Float[Array, "*units"]:
    """P(z <= x): sigmoid(beta logit((x - gamma) / (zeta - gamma)) - log alpha) in [0, 1), 0 below and 1 from 1 on.

    Args:
        x: places.
        log_alpha: location of each gate.
        distribution: constants.

    Example:
        >>> cumulative(jnp.array([-0.5, 0.5, 1.0]), jnp.zeros(3))
        Array([0. , 0.5, 1. ], dtype=float32)

    References:
        Louizos et al. 2018, equations 19 and 20 of appendix A.
    """
    width = distribution.zeta - distribution.gamma
    share = (jnp.clip(x, 0.0, 1.0) - distribution.gamma) / width
    inside = jax.nn.sigmoid(distribution.beta * (jnp.log(share) - jnp.log1p(-share)) - log_alpha)
    inside = jnp.clip(inside, distribution.epsilon, 1 - distribution.epsilon)
    return jnp.where(x < 0, 0.0, jnp.where(x >= 1, 1.0, inside))


def nonzero_probability(
    log_alpha: Float[Array, "*units"], *, distribution: HardConcrete = STANDARD
) -> Float[Array, "*units"]:
    """P(z != 0) = sigmoid(log alpha - beta log(-gamma / zeta)), brought into [epsilon, 1 - epsilon].

    Example:
        >>> nonzero_probability(jnp.array([0.0])).round(4)
        Array([0.8318], dtype=float32)

    References:
        Louizos et al. 2018, equation 12.
    """
    shift = distribution.beta * math.log(-distribution.gamma / distribution.zeta)
    return jnp.clip(jax.nn.sigmoid(log_alpha - shift), distribution.epsilon, 1 - distribution.epsilon)


def deterministic_gates(
    log_alpha: Float[Array, "*units"], *, estimator: Estimator, distribution: HardConcrete = STANDARD
) -> Float[Array, "*units"]:
    """Gates without noise.

    - "louizos": clip(sigmoid(log alpha) (zeta - gamma) + gamma, 0, 1), without beta; zero below log alpha = -2.4.
    - "topk": sigmoid(0.8 log alpha / beta), but zero for the k lowest, k = round(Σ P(z = 0)): as many zeros as
      expected. Among equal ones the lowest indices stay; k is rounded half to even.

    Args:
        log_alpha: gates of one group ("topk" counts over all of them).
        estimator: which one.
        distribution: constants.

    Raises:
        ValueError: an unknown estimator.

    Example:
        >>> log_alpha = jnp.array([-4.0, 0.0, 4.0, -3.0])
        >>> deterministic_gates(log_alpha, estimator="louizos").round(3)
        Array([0. , 0.5, 1. , 0. ], dtype=float32)
        >>> deterministic_gates(log_alpha, estimator="topk").round(2)
        Array([0.        , 0.5       , 0.98999995, 0.        ], dtype=float32)

    References:
        "louizos": Louizos et al. 2018, equation 13. "topk": the released code of CoFi (Xia, Zhong and Chen 2022,
        "Structured pruning learns compact and accurate models") and of LLM-Shearing.
    """
    soft = soft_gates(log_alpha, estimator=estimator, distribution=distribution)
    return soft if estimator == "louizos" else jnp.where(_outranks(log_alpha, distribution), soft, 0.0)


def soft_gates(
    log_alpha: Float[Array, "*units"], *, estimator: Estimator, distribution: HardConcrete = STANDARD
) -> Float[Array, "*units"]:
    """As `deterministic_gates`, but "topk" sets none to zero: for units that were chosen in another way."""
    if estimator not in ("louizos", "topk"):
        raise ValueError(f"`estimator` must be 'louizos' or 'topk', got {estimator!r}.")
    if estimator == "louizos":
        return _stretch(jax.nn.sigmoid(log_alpha), distribution)
    return jax.nn.sigmoid(0.8 * log_alpha / distribution.beta)


def initial_log_alpha(key: jax.Array, shape: tuple[int, ...], drop_rate: float) -> Float[Array, "*units"]:
    """The start of training: log alpha ~ N(log((1 - p) / p), 0.01), p = `drop_rate`, in float32.

    Raises:
        ValueError: `drop_rate` is not in (0, 1).

    References:
        The released code of Louizos et al. 2018, which takes 0.2 for the inputs and 0.5 elsewhere.
    """
    if not 0 < drop_rate < 1:
        raise ValueError(f"A drop rate must be in (0, 1), got {drop_rate}.")
    mean = math.log((1 - drop_rate) / drop_rate)
    return mean + 0.01 * jax.random.normal(key, shape, jnp.float32)


def _stretch(s: Float[Array, "*units"], distribution: HardConcrete) -> Float[Array, "*units"]:
    return jnp.clip(s * (distribution.zeta - distribution.gamma) + distribution.gamma, 0.0, 1.0)


def _outranks(log_alpha: Float[Array, "*units"], distribution: HardConcrete) -> Bool[Array, "*units"]:
    """False for the k lowest, k the rounded expected number of zeros, which may be traced."""
    zeros = jnp.round(jnp.sum(1 - nonzero_probability(log_alpha, distribution=distribution))).astype(jnp.int32)
    return keep_largest([log_alpha], zeros)[0]
