"""The fields of a GGUF file that describe a model, and whether they say all of its config."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcompress._src.models.decoder.rotary import frequencies
from jaxcompress._src.models.families import family_of
from jaxcompress._src.models.hf.config import config_from_huggingface
from jaxcompress._src.models.hf.gguf import ARCHITECTURES, Metadata, described_settings

# What plays no part in the computation, and what the tensors say.
_UNSAID = ("extra", "model_type", "initializer_range", "num_labels", "id2label", "vocab_size", "tie_word_embeddings")
_DROPOUT = ("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")


class Field(NamedTuple):
    """A field of a file.

    Attributes:
        value: a number, a text, a bool, or a list of one of these.
        types: its type and that of its entries, as `gguf.GGUFValueType`; None: as the value is.
    """

    value: Any
    types: tuple[Any, ...] | None = None

    def contents(self) -> Any:
        """The value, as the fields of a `gguf.GGUFReader` give it."""
        return float(np.float32(self.value)) if isinstance(self.value, float) else self.value


def architecture_of(config: Any) -> str:
    """The `general.architecture` of a config.

    Raises:
        ValueError: there is none, or the model has another head than that of a language model.
    """
    family = family_of(config)
    name = "llama" if family.model_type == "mistral" else family.model_type
    if name not in ARCHITECTURES:
        raise ValueError(
            f"A model of type {family.model_type!r} cannot be written as GGUF; supported: {', '.join(ARCHITECTURES)}, "
            "mistral. Take `export.save_huggingface`."
        )
    if config.head != "causal_lm":
        raise ValueError(f"`head` is {config.head!r}; GGUF files are written of language models ('causal_lm') alone.")
    return name


def model_fields(config: Any, architecture: str) -> dict[str, Field]:
    """The fields of a config, by name, with the architecture's."""
    specific = _gpt2_fields(config) if architecture == "gpt2" else _llama_fields(config)
    common = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": _one_or_each(config.intermediate_size),
        "attention.head_count": _one_or_each(config.num_attention_heads),
        "vocab_size": config.vocab_size,
    }
    return {f"{architecture}.{name}": Field(value) for name, value in (common | specific).items()}


def rope_divisors(config: Any) -> np.ndarray | None:
    """The tensor `rope_freqs.weight`, float32: by what frequencies are divided, where Llama 3.1's stretching does."""
    scaling = getattr(config, "rope_scaling", None)
    if scaling is None or scaling.kind != "llama3":
        return None
    plain, stretched = (frequencies(config.head_size, config.rope_theta, each)[0] for each in (None, scaling))
    return (plain / stretched).astype(np.float32)


def check_described(config: Any, architecture: str, fields: Mapping[str, Field], divisors: np.ndarray | None) -> None:
    """Raises where a file with these fields would be read as another model.

    Raises:
        ValueError: names what the format does not say of the config, and what would be read.
    """
    path = Path("the file")
    metadata = Metadata({"general.architecture": Field(architecture), **fields}, path)
    slowed = None if divisors is None else divisors.astype(np.float64)
    settings = described_settings(metadata, slowed, path)
    settings |= {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_word_embeddings}
    read = config_from_huggingface(settings)
    names = [each.name for each in dataclasses.fields(config) if each.name not in (*_UNSAID, *_DROPOUT)]
    for name in names:
        wanted, found = getattr(config, name), getattr(read, name)
        same = np.float32(wanted) == np.float32(found) if isinstance(wanted, float) else wanted == found
        if not same:
            raise ValueError(
                f"GGUF files of architecture {architecture!r} do not say that `{name}` is {wanted!r}: it would be read "
                f"as {found!r}. Take `export.save_huggingface`, or `jaxcompress.checkpoint`."
            )


def _llama_fields(config: Any) -> dict[str, Any]:
    fields = {
        "attention.head_count_kv": _one_or_each(config.num_key_value_heads),
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_size,
        "rope.freq_base": float(config.rope_theta),
    }
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind != "llama3":
        fields |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": float(scaling.factor)}
        if scaling.original is not None:
            fields["rope.scaling.original_context_length"] = scaling.original
    return fields


def _gpt2_fields(config: Any) -> dict[str, Any]:
    return {"attention.layer_norm_epsilon": float(config.layer_norm_eps)}


def _one_or_each(sizes: tuple[int, ...]) -> int | list[int]:
    return sizes[0] if len(set(sizes)) == 1 else list(sizes)
