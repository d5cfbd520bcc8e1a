"""Every parameter of a BERT, or of one of its variants, and its shape, from the config alone."""

from jaxcompress._src.models.bert.config import BertConfig


def parameter_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by path.

    Args:
        config: sizes and head.

    Returns:
        Paths with slashes, those of Hugging Face Flax; kernels are (in, out).

    Example:
        >>> config = BertConfig(
        ...     vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=(4, 1), intermediate_size=64,
        ...     head_size=8,
        ... )
        >>> parameter_shapes(config)["encoder/layer/1/attention/self/query/kernel"]
        (32, 8)
    """
    shapes = _embedding_shapes(config)
    for layer in range(config.num_hidden_layers):
        shapes |= _layer_shapes(config, layer)
    if config.has_pooler:
        shapes |= _dense("pooler/dense", config.hidden_size, config.hidden_size)
    return {prefixed(path, config): shape for path, shape in shapes.items()} | head_shapes(config)


def head_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the head, by path; a plain encoder has none."""
    hidden, variant, shapes = config.hidden_size, config.variant, {}
    if config.head == "sequence_classification":
        for path in variant.classifier[:-1]:
            shapes |= _dense(path, hidden, hidden)
        return shapes | _dense(variant.classifier[-1], hidden, config.num_labels)
    if config.head == "masked_lm":
        shapes = _dense(variant.transform, hidden, hidden) | _norm(variant.transform_norm, hidden)
        return shapes | {variant.decoder_bias: (config.vocab_size,)}
    return shapes


def prefixed(path: str, config: BertConfig) -> str:
    """A path of the body with the prefix that it has where there is a head."""
    return path if config.head == "encoder" else f"{config.variant.prefix}/{path}"


def _embedding_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    rows = {
        "word_embeddings": config.vocab_size,
        "position_embeddings": config.max_position_embeddings,
        "token_type_embeddings": config.type_vocab_size,
    }
    tables = {f"embeddings/{name}/embedding": (count, config.hidden_size) for name, count in rows.items() if count}
    return tables | _norm("embeddings/LayerNorm", config.hidden_size)


def _layer_shapes(config: BertConfig, layer: int) -> dict[str, tuple[int, ...]]:
    variant, hidden = config.variant, config.hidden_size
    inner, width = config.num_attention_heads[layer] * config.head_size, config.intermediate_size[layer]
    shapes = {
        **_dense(variant.query, hidden, inner),
        **_dense(variant.key, hidden, inner),
        **_dense(variant.value, hidden, inner),
        **_dense(variant.attention_output, inner, hidden),
        **_norm(variant.attention_norm, hidden),
        **_dense(variant.ffn_input, hidden, width),
        **_dense(variant.ffn_output, width, hidden),
        **_norm(variant.ffn_norm, hidden),
    }
    return {f"{variant.layers}/{layer}/{path}": shape for path, shape in shapes.items()}


def _dense(path: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{path}/kernel": (inputs, outputs), f"{path}/bias": (outputs,)}


def _norm(path: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{path}/scale": (size,), f"{path}/bias": (size,)}
