"""Tiny models with quantized kernels, the same for all formats."""

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from golden_weights import weights

from jaxcompress._src.models.families import family_of
from jaxcompress.models import BertConfig, GPT2Config, LlamaConfig, make_module
from jaxcompress.quantization import QuantSpec, quantize
from jaxcompress.tree import by_path

LLAMA = {
    "vocab_size": 23,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 32,
}
CONFIGS = {
    "llama": LlamaConfig(**LLAMA),
    "tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "mistral": LlamaConfig(**LLAMA, model_type="mistral"),
    "qwen2": LlamaConfig(**LLAMA, model_type="qwen2", qkv_bias=True),
    "qwen3": LlamaConfig(**LLAMA, model_type="qwen3", qk_norm=True),
    "gpt2": GPT2Config(
        vocab_size=23, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16
    ),
    "bert": BertConfig(vocab_size=23, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
}
KERNELS = {"gpt2": r"transformer/h/.*/kernel", "bert": r"encoder/layer/.*/kernel"}
INT4 = QuantSpec(bits=4, group_size=32)


def kernels(name):
    return KERNELS.get(name, r"model/layers/.*/kernel")


def leaves_of(config, dtype=np.float32):
    shapes = {path: parameter.shape for path, parameter in family_of(config).parameters(config).items()}
    return {path: jnp.asarray(array.astype(dtype)) for path, array in weights(shapes).items()}


def quantized_model(name, specs=INT4, *, dtype=np.float32):
    """Module and params with compressed leaves, of a config or its name; `specs` are one for all layers, or by path."""
    config = CONFIGS[name] if isinstance(name, str) else name
    params = unflatten_dict(leaves_of(config, dtype), sep="/")
    for pattern, spec in (specs if isinstance(specs, dict) else {kernels(name): specs}).items():
        params, _ = quantize(params, spec, select=by_path(pattern))
    return make_module(config), params
