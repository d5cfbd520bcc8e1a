"""Between `GPT2Config` and the settings of a Hugging Face `config.json`."""

from collections.abc import Mapping
from typing import Any

from jaxcompress._src.models.gpt2.config import HEADS, GPT2Config
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

_SIZES = {  # in files -> ours
    "vocab_size": "vocab_size",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
_OPTIONAL = {
    "n_positions": "max_position_embeddings",
    "activation_function": "hidden_act",
    "layer_norm_epsilon": "layer_norm_eps",
    "resid_pdrop": "resid_pdrop",
    "embd_pdrop": "embd_pdrop",
    "attn_pdrop": "attn_pdrop",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
}
_UNSUPPORTED = {  # settings under which GPT-2 computes something else, and the only value we compute
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "quantization_config": None,
}
_UNEVEN = ("num_attention_heads", "intermediate_size")


def gpt2_config(settings: Mapping[str, Any], head: str | None) -> GPT2Config:
    """The config that the settings of a Hugging Face `config.json` describe.

    What Hugging Face has no key for stands in a mapping under the key `jaxcompress`: `head_size` (where it is not
    `n_embd / n_head`), and the per-layer lists `num_attention_heads` and `intermediate_size` (where they are not
    uniform).

    Args:
        settings: the parsed `config.json`.
        head: "decoder", "causal_lm" or "sequence_classification"; None: what `architectures` says.

    Raises:
        ValueError: an unsupported setting, a missing size, or no known architecture.

    Example:
        >>> config = gpt2_config(
        ...     {"architectures": ["GPT2LMHeadModel"], "vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4}, None
        ... )
        >>> config.head, config.intermediate_size
        ('causal_lm', (128, 128))
        >>> gpt2_settings(config)["n_inner"]
        128
    """
    check_supported(settings, _UNSUPPORTED)
    check_sizes(settings, tuple(_SIZES), layers="n_layer", may_be_zero=("n_head",))
    known = {*_SIZES, *_OPTIONAL, *_UNSUPPORTED, *DERIVED, "n_inner", "n_ctx"}
    extra = settings.get(OWN_KEY) or {}
    sizes = {name: settings[key] for key, name in _SIZES.items()} | {"intermediate_size": settings.get("n_inner")}
    return GPT2Config(
        head=head or head_by_architecture(settings.get("architectures"), HEADS),
        extra={name: value for name, value in settings.items() if name not in known},
        **(sizes | {name: extra[name] for name in (*_UNEVEN, "head_size") if name in extra}),
        **{name: settings[key] for key, name in _OPTIONAL.items() if key in settings},
        **label_options(settings),
    )


def gpt2_settings(config: GPT2Config) -> dict[str, Any]:
    """The settings of a Hugging Face `config.json`, from which `gpt2_config` makes the same config.

    For sizes that are not uniform, the keys of Hugging Face hold the largest: it then refuses the weights, loudly.
    """
    settings: dict[str, Any] = {
        **config.extra,
        "architectures": [HEADS[config.head].architectures[0]],
        "model_type": "gpt2",
        **{key: getattr(config, name) for key, name in (_SIZES | _OPTIONAL).items()},
        "n_head": max(config.num_attention_heads),
        "n_inner": max(config.intermediate_size),
        **label_settings(config),
    }
    ours: dict[str, Any] = {**uneven_sizes(config, _UNEVEN)}
    if "num_attention_heads" in ours or config.head_size * config.num_attention_heads[0] != config.hidden_size:
        ours["head_size"] = config.head_size
    return settings | ({OWN_KEY: ours} if ours else {})
