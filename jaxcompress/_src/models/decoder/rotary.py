"""Rotary positions (RoPE) and the ways to stretch them over longer texts.

Shape letters: B leading axes, L tokens, H heads, d width of a head.
"""

import dataclasses
import math
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

Stretching: TypeAlias = Literal["linear", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the frequencies of rotary positions are changed, to read longer texts than a model was first trained on.

    With θ_i = base^(-2 i / d) the frequency of the pair i, and s = `factor`:

    - "linear": θ_i / s.
    - "llama3": θ_i / s where the wavelength 2π / θ_i is above `original / low_freq_factor`, θ_i where it is below
      `original / high_freq_factor`, and between the two a mean of both, linear in `original / wavelength`.
    - "yarn": θ_i where pair i turns more than `beta_fast` times over `original` positions, θ_i / s where it turns less
      than `beta_slow` times, a mean linear in i between; and cosines and sines are multiplied by `attention_factor`.

    Attributes:
        kind: one of these.
        factor: s, at least 1.
        original: positions of the first training: `original_max_position_embeddings`. Not of "linear".
        low_freq_factor: of "llama3".
        high_freq_factor: of "llama3".
        beta_fast: of "yarn".
        beta_slow: of "yarn".
        attention_factor: of "yarn"; None: .1 ln s + 1.
        truncate: of "yarn": whether the bounds of the mean are whole numbers.

    References:
        Chen et al. 2023 (linear); Dubey et al. 2024, "The Llama 3 herd of models"; Peng et al. 2023, "YaRN".
    """

    kind: Stretching
    factor: float
    original: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        """Checks the options."""
        if self.kind not in get_args(Stretching):
            raise ValueError(f"`rope_scaling` is of kind {self.kind!r}; supported: {', '.join(get_args(Stretching))}.")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ValueError(f"`{name}` of `rope_scaling` must be a finite number above 0, got {value!r}.")
        if self.factor < 1:
            raise ValueError(f"`factor` of `rope_scaling` must be at least 1, got {self.factor}.")
        if self.kind != "linear" and (not isinstance(self.original, int) or self.original < 1):
            raise ValueError(
                f"`original_max_position_embeddings` of `rope_scaling` must be an int above 0, got {self.original!r}."
            )
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"`low_freq_factor` of `rope_scaling` must be below `high_freq_factor`, got {self.low_freq_factor} and "
                f"{self.high_freq_factor}."
            )


def frequencies(width: int, base: float, scaling: RopeScaling | None) -> tuple[np.ndarray, float]:
    """The frequency of each pair of a head's features, float64 (d / 2,), and the factor of cosines and sines.

    Example:
        >>> frequencies(4, 100.0, None)[0].tolist()
        [1.0, 0.1]
        >>> frequencies(4, 100.0, RopeScaling(kind="linear", factor=2.0))[0].tolist()
        [0.5, 0.05]
    """
    plain = base ** -(np.arange(0, width, 2) / width)
    if scaling is None:
        return plain, 1.0
    stretched = plain / scaling.factor
    if scaling.kind == "linear" or scaling.original is None:
        return stretched, 1.0
    if scaling.kind == "llama3":
        turns = scaling.original * plain / (2 * math.pi)
        share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        share = np.clip(share, 0.0, 1.0)
        return stretched * (1 - share) + plain * share, 1.0
    low, high = (_pair(turns, width, base, scaling.original) for turns in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    share = np.clip((np.arange(width // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return stretched * share + plain * (1 - share), factor


def rotation(positions: jax.Array, width: int, base: float, scaling: RopeScaling | None) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 (B, L, 1, d / 2), of the angles by which pairs of features turn."""
    each, factor = frequencies(width, base, scaling)
    angles = jnp.einsum("...l,f->...lf", positions.astype(jnp.float32), each.astype(np.float32))
    return jnp.cos(angles)[..., None, :] * factor, jnp.sin(angles)[..., None, :] * factor


def rotated(features: jax.Array, by: tuple[jax.Array, jax.Array]) -> jax.Array:
    """(B, L, H, d), whose feature i and feature i + d / 2 are a pair, turned; computed in float32."""
    cosine, sine = by
    first, second = jnp.split(features.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(features.dtype)


def rope_scaling(settings: Any, most: int) -> RopeScaling | None:
    """The `rope_scaling`, or `rope_parameters`, of a `config.json`.

    Args:
        settings: that entry; None or of type "default": nothing is scaled.
        most: `max_position_embeddings`: the original positions where the entry does not say them.

    Raises:
        ValueError: no mapping, an unknown kind, or values out of range.
    """
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise ValueError(f"`rope_scaling` must be a mapping, got {settings!r:.80}.")
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return None
    names = ("factor", *(name for name in _NAMES if name in settings and settings[name] is not None))
    if "factor" not in settings:
        raise ValueError("`rope_scaling` has no `factor`.")
    if unknown := sorted({"mscale", "mscale_all_dim", "short_factor", "long_factor"} & set(settings)):
        raise ValueError(f"`{unknown[0]}` of `rope_scaling` is not supported.")
    original = settings.get("original_max_position_embeddings")
    return RopeScaling(kind=kind, original=most if original is None else original, **{n: settings[n] for n in names})


def rope_settings(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The `rope_scaling` of a `config.json`, from which `rope_scaling` makes the same."""
    if scaling is None:
        return None
    used = {
        "linear": (),
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
    }[scaling.kind]
    values = {name: getattr(scaling, name) for name in used if getattr(scaling, name) is not None}
    settings = {"rope_type": scaling.kind, "factor": scaling.factor, **values}
    if scaling.kind != "linear":
        settings["original_max_position_embeddings"] = scaling.original
    return settings


_NAMES = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "truncate")


def _pair(turns: float, width: int, base: float, positions: int) -> float:
    """The number of the pair that turns so many times over these positions."""
    return width * math.log(positions / (turns * 2 * math.pi)) / (2 * math.log(base))
