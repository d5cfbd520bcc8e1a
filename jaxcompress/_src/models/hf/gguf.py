"""GGUF files, as a `config.json` and tensors of PyTorch: what llama.cpp runs.

Blocks of codes are dequantized, and what llama.cpp has in another order or orientation is put back.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcompress._src.models.decoder.rotary import RopeScaling, frequencies, rope_settings

_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
SLOWED = "rope_freqs.weight"
"""Divisors of the rotary frequencies, where those of Llama 3.1 are stretched."""

_LLAMA3_POSITIONS = 8192  # of the first training of every Llama 3


class Architecture(NamedTuple):
    """What `general.architecture` says of a file.

    Attributes:
        settings: `metadata -> config.json`.
        names: of tensors, without the number of their layer -> names in PyTorch.
        layer: where layers are in PyTorch.
        turned: whether queries and keys are in the order of interleaved rotary pairs.
        transposed: names of kernels that PyTorch keeps as (in, out).
    """

    settings: Callable[["Metadata"], dict[str, Any]]
    names: Mapping[str, str]
    layer: str
    turned: bool = False
    transposed: tuple[str, ...] = ()


class Metadata:
    """The fields of a file, those of its architecture without its name."""

    def __init__(self, fields: Mapping[str, Any], path: Path) -> None:
        self._fields, self._path = fields, path
        self.architecture = str(self.get("general.architecture", "", whole=True))

    def get(self, name: str, default: Any = None, *, whole: bool = False) -> Any:
        """A field, or a default where there is none."""
        full = name if whole else f"{self.architecture}.{name}"
        return self._fields[full].contents() if full in self._fields else default

    def need(self, name: str) -> Any:
        """A field that must be there."""
        if (value := self.get(name)) is None:
            raise ValueError(f"{str(self._path)!r} has no field `{self.architecture}.{name}`.")
        return value


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file."""
    return path.suffix == ".gguf" and not path.is_dir()


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A file's `config.json` and tensors, by name and in the orientation of PyTorch, float32.

    Args:
        path: of a file of one of the architectures gpt2, llama (Llama, Mistral, SmolLM2), qwen2, qwen3.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: the package `gguf` is missing: the extra `jaxcompress[gguf]`.
        ValueError: it is damaged, of another architecture, or has tensors that are not known; names them.
    """
    reader = gguf_reader(path)
    metadata = Metadata(reader.fields, path)
    if metadata.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{str(path)!r} is of architecture {metadata.architecture!r}; supported: {known}.")
    architecture = ARCHITECTURES[metadata.architecture]
    arrays, slowed = {}, None
    for tensor in reader.tensors:
        if architecture.turned and tensor.name == SLOWED:
            slowed = np.asarray(tensor.data, np.float64)
            continue
        name, number = _name(tensor.name, architecture, path)
        arrays[name] = _array(tensor, name, number, architecture, metadata, path)
    settings = described_settings(metadata, slowed, path)
    embedding = arrays.get(f"{architecture.names['token_embd']}.weight")
    if embedding is None:
        raise ValueError(f"{str(path)!r} has no tensor `token_embd.weight`.")
    tied = "lm_head.weight" not in arrays or np.array_equal(arrays["lm_head.weight"], embedding)
    return settings | {"vocab_size": embedding.shape[0], "tie_word_embeddings": tied}, arrays


def described_settings(metadata: Metadata, slowed: np.ndarray | None, path: Path) -> dict[str, Any]:
    """The `config.json` that the fields of a file describe, without what its tensors say.

    Args:
        metadata: of a supported architecture.
        slowed: the tensor `rope_freqs.weight`, if there is one: divisors of the rotary frequencies.
        path: of the file, for messages.

    Raises:
        ValueError: a field is missing, or says what is not supported.
    """
    _check_read(metadata, path)
    settings = ARCHITECTURES[metadata.architecture].settings(metadata)
    if slowed is not None:
        settings["rope_scaling"] = _llama3_scaling(slowed, settings, path)
    return settings


def _check_read(metadata: Metadata, path: Path) -> None:
    """Raises for what changes the computation and is not read: it would be left out without a word."""
    if window := metadata.get("attention.sliding_window"):
        raise ValueError(f"{str(path)!r} has a sliding window of {window} tokens; none is supported in GGUF files.")
    turned, size = metadata.get("rope.dimension_count"), metadata.get("attention.key_length")
    if turned is not None and size is not None and turned != size:
        raise ValueError(f"{str(path)!r} turns {turned} of the {size} features of a head; only all are supported.")


def read_gguf_tokenizer(path: Path) -> dict[str, Any]:
    """The fields of a file that describe its tokenizer, without `tokenizer.`, and `context_length`."""
    reader = gguf_reader(path)
    begins = "tokenizer."
    fields = {name.removeprefix(begins): field for name, field in reader.fields.items() if name.startswith(begins)}
    metadata = Metadata(reader.fields, path)
    return {name: field.contents() for name, field in fields.items()} | {
        "context_length": metadata.get("context_length")
    }


def gguf_package() -> Any:
    """The package `gguf`, which is an extra.

    Raises:
        ModuleNotFoundError: it is missing.
    """
    try:
        import gguf
    except ModuleNotFoundError as err:
        raise ModuleNotFoundError("GGUF files need gguf: pip install 'jaxcompress[gguf]'", name=err.name) from err
    return gguf


def gguf_reader(path: Path) -> Any:
    """The `gguf.GGUFReader` of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: the package `gguf` is missing.
        ValueError: the file is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    GGUFReader = gguf_package().GGUFReader
    try:
        return GGUFReader(path)
    except Exception as err:  # damaged bytes surface as errors of many types
        raise ValueError(f"{str(path)!r} is damaged or not a GGUF file: {err}.") from err


def _name(stored: str, architecture: Architecture, path: Path) -> tuple[str, int | None]:
    """The name in PyTorch, and the number of the layer."""
    *parents, leaf = stored.split(".")
    number = int(parents[1]) if len(parents) == 3 and parents[0] == "blk" and parents[1].isdigit() else None
    bare = parents[-1] if parents else ""
    if bare not in architecture.names or leaf not in ("weight", "bias"):
        raise ValueError(f"{str(path)!r} has a tensor {stored!r} that is not known.")
    name = architecture.names[bare]
    return f"{name}.{leaf}" if number is None else f"{architecture.layer}.{number}.{name}.{leaf}", number


def _array(
    tensor: Any, name: str, number: int | None, architecture: Architecture, metadata: Metadata, path: Path
) -> np.ndarray:
    from gguf import quants

    try:
        array = np.asarray(quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
    except (NotImplementedError, ValueError) as err:
        raise ValueError(
            f"Tensor {tensor.name!r} of {str(path)!r} is {tensor.tensor_type!r}, which cannot be read: {err}"
        ) from err
    array = array.reshape([int(size) for size in reversed(tensor.shape)])
    if architecture.turned and name.endswith((".q_proj.weight", ".k_proj.weight", ".q_proj.bias", ".k_proj.bias")):
        kind = "head_count" if ".q_proj." in name else "head_count_kv"
        heads = _of_layer(metadata.get(f"attention.{kind}", metadata.need("attention.head_count")), number)
        array = _half_split(array, heads)
    return np.ascontiguousarray(array.T) if name.endswith(architecture.transposed) else array


def _half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows (2i, 2i + 1) of each head, which turn together, as rows i and i + d / 2."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(np.swapaxes(pairs, 1, 2)).reshape(rows.shape)


def _of_layer(sizes: Any, number: int | None) -> int:
    return int(sizes if number is None or not isinstance(sizes, list) else sizes[number])


def _llama_settings(metadata: Metadata) -> dict[str, Any]:
    kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[metadata.architecture]
    heads, layers = metadata.need("attention.head_count"), metadata.need("block_count")
    uneven = {
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("attention.head_count_kv", heads),
        "intermediate_size": metadata.need("feed_forward_length"),
    }
    largest = {name: max(sizes) if isinstance(sizes, list) else sizes for name, sizes in uneven.items()}
    width = metadata.need("embedding_length")
    lists = {name: sizes for name, sizes in uneven.items() if isinstance(sizes, list)}
    return {
        "model_type": metadata.architecture,
        "architectures": [f"{kind}ForCausalLM"],
        "hidden_size": width,
        "num_hidden_layers": layers,
        **largest,
        "head_dim": metadata.get("attention.key_length", width // max(largest["num_attention_heads"], 1)),
        "max_position_embeddings": metadata.need("context_length"),
        "rms_norm_eps": _short(metadata.need("attention.layer_norm_rms_epsilon")),
        "rope_theta": metadata.get("rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(metadata),
        "hidden_act": "silu",
    } | ({"jaxcompress": lists} if lists else {})


def _gpt2_settings(metadata: Metadata) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": metadata.need("embedding_length"),
        "n_layer": metadata.need("block_count"),
        "n_head": metadata.need("attention.head_count"),
        "n_inner": metadata.need("feed_forward_length"),
        "n_positions": metadata.need("context_length"),
        "layer_norm_epsilon": _short(metadata.need("attention.layer_norm_epsilon")),
    }


def _rope_scaling(metadata: Metadata) -> dict[str, Any] | None:
    kind = metadata.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    original = metadata.get("rope.scaling.original_context_length")
    return {
        "rope_type": kind,
        "factor": metadata.need("rope.scaling.factor"),
        **({} if original is None else {"original_max_position_embeddings": original}),
    }


def _llama3_scaling(slowed: np.ndarray, settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What llama.cpp's converter has made such divisors of the frequencies from, which it does not write itself."""
    scaling = RopeScaling(kind="llama3", factor=_short(slowed.max(initial=1.0)), original=_LLAMA3_POSITIONS)
    width, base = settings["head_dim"], settings["rope_theta"]
    expected = frequencies(width, base, None)[0] / frequencies(width, base, scaling)[0]
    if slowed.shape != expected.shape or not np.allclose(slowed, expected, rtol=1e-3):
        raise ValueError(
            f"`{SLOWED}` of {str(path)!r} are not the divisors of Llama 3.1 for heads of width {width} and a "
            f"factor of {scaling.factor:g}; others are not supported."
        )
    return rope_settings(scaling) or {}


def _short(number: float) -> float:
    """A float32 as it was once written: 1e-5, not 9.999999747378752e-06."""
    return float(np.format_float_scientific(np.float32(number)))


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(_llama_settings, _LLAMA_NAMES, "model.layers", turned=True),
    "qwen2": Architecture(_llama_settings, _LLAMA_NAMES, "model.layers"),
    "qwen3": Architecture(_llama_settings, _LLAMA_NAMES, "model.layers"),
    "gpt2": Architecture(
        _gpt2_settings,
        _GPT2_NAMES,
        "transformer.h",
        transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
    ),
}
