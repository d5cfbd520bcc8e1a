"""Between `LlamaConfig` and the settings of a Hugging Face `config.json`."""

from collections.abc import Mapping
from typing import Any

from jaxcompress._src.models.decoder.rotary import rope_scaling, rope_settings
from jaxcompress._src.models.hf.settings import (
    DERIVED,
    OWN_KEY,
    check_sizes,
    check_supported,
    head_by_architecture,
    label_options,
    label_settings,
    uneven_sizes,
)
from jaxcompress._src.models.llama.config import MODEL_TYPES, LlamaConfig, heads_of

_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_OPTIONAL = (
    "max_position_embeddings",
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_dropout",
    "initializer_range",
)
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
_BIASES = ("attention_bias", "mlp_bias")
_WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
_UNSUPPORTED = {"quantization_config": None, "pretraining_tp": 1, "partial_rotary_factor": 1.0}
_UNEVEN = ("num_attention_heads", "num_key_value_heads", "intermediate_size")

# What Hugging Face takes for a key that is not there, where it is not what `LlamaConfig` takes.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32_768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "head_dim": 128},
}


def llama_config(settings: Mapping[str, Any], head: str | None) -> LlamaConfig:
    """The config that the settings of a Hugging Face `config.json` describe.

    What Hugging Face has no key for stands in a mapping under the key `jaxcompress`: the per-layer lists
    `num_attention_heads`, `num_key_value_heads` and `intermediate_size`, where they are not uniform.

    Args:
        settings: the parsed `config.json`, as transformers 4 or 5 writes it.
        head: "decoder", "causal_lm" or "sequence_classification"; None: what `architectures` says.

    Raises:
        ValueError: an unsupported setting, a missing size, or no known architecture.

    Example:
        >>> config = llama_config(
        ...     {
        ...         "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 60, "hidden_size": 32,
        ...         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
        ...     },
        ...     None,
        ... )
        >>> config.qkv_bias, config.output_bias, config.num_key_value_heads
        (True, False, (2, 2))
        >>> llama_settings(config)["num_key_value_heads"]
        2
    """
    model_type = settings["model_type"]
    check_supported(settings, _UNSUPPORTED)
    check_sizes(
        settings, _REQUIRED, layers="num_hidden_layers", may_be_zero=("num_attention_heads", "intermediate_size")
    )
    known = {*_REQUIRED, *_OPTIONAL, *_ROPE, *_BIASES, *_WINDOWS, *_UNSUPPORTED, *DERIVED}
    known |= {"num_key_value_heads", "head_dim"}
    whole = {**_DEFAULTS[model_type], **settings}
    most = whole.get("max_position_embeddings", LlamaConfig.max_position_embeddings)
    return LlamaConfig(
        model_type=model_type,
        head=head or head_by_architecture(settings.get("architectures"), heads_of(MODEL_TYPES[model_type])),
        extra={name: value for name, value in settings.items() if name not in known},
        sliding_window=_sliding_window(whole),
        qk_norm=model_type == "qwen3",
        **{name: whole[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")},
        **{name: whole[name] for name in _OPTIONAL if name in whole},
        **_layer_sizes(whole),
        **_biases(whole),
        **_rope(whole, most),
        **label_options(settings),
    )


def llama_settings(config: LlamaConfig) -> dict[str, Any]:
    """The settings of a Hugging Face `config.json`, from which `llama_config` makes the same config.

    For sizes that are not uniform, the keys of Hugging Face hold the largest: it then refuses the weights, loudly.
    """
    heads = heads_of(MODEL_TYPES[config.model_type])
    settings: dict[str, Any] = {
        **config.extra,
        "architectures": [heads[config.head].architectures[0]],
        "model_type": config.model_type,
        **{name: getattr(config, name) for name in (*_REQUIRED, *_OPTIONAL)},
        **{name: max(getattr(config, name)) for name in _UNEVEN},
        "head_dim": config.head_size,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_settings(config.rope_scaling),
        **_bias_settings(config),
        **_window_settings(config),
        **label_settings(config),
    }
    if uneven := uneven_sizes(config, _UNEVEN):
        settings[OWN_KEY] = uneven
    return settings


def _layer_sizes(settings: Mapping[str, Any]) -> dict[str, Any]:
    heads = settings["num_attention_heads"]
    keys = settings.get("num_key_value_heads")
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": heads if keys is None else keys,
        "intermediate_size": settings["intermediate_size"],
    }
    if settings.get("head_dim") is not None:
        sizes["head_size"] = settings["head_dim"]
    return sizes | {name: value for name, value in (settings.get(OWN_KEY) or {}).items() if name in _UNEVEN}


def _biases(settings: Mapping[str, Any]) -> dict[str, bool]:
    if settings["model_type"] == "qwen2":
        return {"qkv_bias": True}
    if settings["model_type"] == "mistral":
        return {}
    bias = settings.get("attention_bias", False)
    mlp = settings.get("mlp_bias", False) if settings["model_type"] == "llama" else False
    return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": mlp}


def _bias_settings(config: LlamaConfig) -> dict[str, bool]:
    """Of a Qwen 2 and a Mistral they are what they are."""
    names = {"llama": _BIASES, "qwen3": _BIASES[:1]}.get(config.model_type, ())
    biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return {name: biases[name] for name in names}


def _rope(settings: Mapping[str, Any], most: int) -> dict[str, Any]:
    """Transformers 5 has base and scaling in one mapping, 4 beside one another."""
    parameters = settings.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"`rope_parameters` must be a mapping, got {parameters!r:.80}.")
    theta = parameters.get("rope_theta", settings.get("rope_theta", LlamaConfig.rope_theta))
    scaling = settings.get("rope_scaling") or (dict(parameters) if parameters else None)
    return {"rope_theta": theta, "rope_scaling": rope_scaling(scaling, most)}


def _sliding_window(settings: Mapping[str, Any]) -> Any:
    """Of each layer, or one for all."""
    window, layers = settings.get("sliding_window"), settings["num_hidden_layers"]
    if settings["model_type"] == "llama" or window is None:
        return None
    if settings["model_type"] == "mistral":
        return window
    if not settings.get("use_sliding_window", False):
        return None
    types = settings.get("layer_types")
    if types is None:
        first = settings.get("max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(layers))
    if unknown := sorted(set(types) - {"full_attention", "sliding_attention"}):
        raise ValueError(f"`layer_types` has {unknown[0]!r}; supported: full_attention, sliding_attention.")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _window_settings(config: LlamaConfig) -> dict[str, Any]:
    windows = set(config.sliding_window)
    if config.model_type == "llama":
        return {}
    if config.model_type == "mistral":
        return {"sliding_window": config.sliding_window[0]}
    if windows == {None}:
        return {"use_sliding_window": False, "sliding_window": None}
    kinds = ["full_attention" if window is None else "sliding_attention" for window in config.sliding_window]
    return {
        "use_sliding_window": True,
        "sliding_window": max(window for window in windows if window is not None),
        "layer_types": kinds,
        "max_window_layers": kinds.index("sliding_attention"),
    }
