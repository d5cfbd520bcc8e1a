"""Every parameter of a GPT-2, its shape, and where it is in files."""

from jaxcompress._src.models.gpt2.config import GPT2Config
from jaxcompress._src.models.hf.names import Parameter, torch_name


def gpt2_parameters(config: GPT2Config) -> dict[str, Parameter]:
    """The parameters by path. Files keep (in, out) in PyTorch and (out, in) in Flax, but for the heads."""
    parameters = {}
    for path, shape in parameter_shapes(config).items():
        fused = path.endswith("/kernel") and "/c_" in path
        turned = path.endswith("/kernel") and not fused
        parameters[path] = Parameter(shape, torch_name(path), transposed=turned, flax_transposed=fused)
    return parameters


def parameter_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by path.

    Returns:
        Paths with slashes, those of Hugging Face Flax; kernels are (in, out).

    Example:
        >>> config = GPT2Config(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
        >>> parameter_shapes(config)["transformer/h/0/attn/c_attn/kernel"]
        (32, 96)
    """
    hidden = config.hidden_size
    shapes = {"wte/embedding": (config.vocab_size, hidden), "wpe/embedding": (config.max_position_embeddings, hidden)}
    for layer in range(config.num_hidden_layers):
        shapes |= _layer_shapes(config, layer)
    shapes |= _norm("ln_f", hidden)
    if config.head == "decoder":
        return shapes
    shapes = {f"transformer/{path}": shape for path, shape in shapes.items()}
    if config.head == "sequence_classification":
        shapes["score/kernel"] = (hidden, config.num_labels)
    elif not config.tie_word_embeddings:
        shapes["lm_head/kernel"] = (hidden, config.vocab_size)
    return shapes


def _layer_shapes(config: GPT2Config, layer: int) -> dict[str, tuple[int, ...]]:
    path, hidden = f"h/{layer}", config.hidden_size
    inner, width = config.num_attention_heads[layer] * config.head_size, config.intermediate_size[layer]
    return {
        **_norm(f"{path}/ln_1", hidden),
        **_dense(f"{path}/attn/c_attn", hidden, 3 * inner),
        **_dense(f"{path}/attn/c_proj", inner, hidden),
        **_norm(f"{path}/ln_2", hidden),
        **_dense(f"{path}/mlp/c_fc", hidden, width),
        **_dense(f"{path}/mlp/c_proj", width, hidden),
    }


def _dense(path: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{path}/kernel": (inputs, outputs), f"{path}/bias": (outputs,)}


def _norm(path: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{path}/scale": (size,), f"{path}/bias": (size,)}
