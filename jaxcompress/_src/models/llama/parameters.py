"""Every parameter of a Llama and its shape, from the config alone."""

from jaxcompress._src.models.llama.config import LlamaConfig


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by path.

    Returns:
        Paths with slashes, those of Hugging Face Flax; kernels are (in, out).

    Example:
        >>> config = LlamaConfig(
        ...     vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        ...     intermediate_size=64,
        ... )
        >>> parameter_shapes(config)["model/layers/0/self_attn/k_proj/kernel"]
        (32, 16)
    """
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens/embedding": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        shapes |= _layer_shapes(config, layer)
    shapes["norm/weight"] = (hidden,)
    if config.head == "decoder":
        return shapes
    shapes = {f"model/{path}": shape for path, shape in shapes.items()}
    if config.head == "sequence_classification":
        shapes["score/kernel"] = (hidden, config.num_labels)
    elif not config.tie_word_embeddings:
        shapes["lm_head/kernel"] = (hidden, config.vocab_size)
    return shapes


def _layer_shapes(config: LlamaConfig, layer: int) -> dict[str, tuple[int, ...]]:
    path, hidden, size = f"layers/{layer}", config.hidden_size, config.head_size
    queries, keys = config.num_attention_heads[layer] * size, config.num_key_value_heads[layer] * size
    width = config.intermediate_size[layer]
    norms = {f"{path}/self_attn/{name}_norm/weight": (size,) for name in ("q", "k")} if config.qk_norm else {}
    return {
        f"{path}/input_layernorm/weight": (hidden,),
        **_dense(f"{path}/self_attn/q_proj", hidden, queries, config.qkv_bias),
        **_dense(f"{path}/self_attn/k_proj", hidden, keys, config.qkv_bias),
        **_dense(f"{path}/self_attn/v_proj", hidden, keys, config.qkv_bias),
        **norms,
        **_dense(f"{path}/self_attn/o_proj", queries, hidden, config.output_bias),
        f"{path}/post_attention_layernorm/weight": (hidden,),
        **_dense(f"{path}/mlp/gate_proj", hidden, width, config.mlp_bias),
        **_dense(f"{path}/mlp/up_proj", hidden, width, config.mlp_bias),
        **_dense(f"{path}/mlp/down_proj", width, hidden, config.mlp_bias),
    }


def _dense(path: str, inputs: int, outputs: int, bias: bool) -> dict[str, tuple[int, ...]]:
    return {f"{path}/kernel": (inputs, outputs)} | ({f"{path}/bias": (outputs,)} if bias else {})
