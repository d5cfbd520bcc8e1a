"""Every parameter of a BERT and its shape, from the config alone."""

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
    hidden = config.hidden_size
    shapes = _embedding_shapes(config)
    for layer in range(config.num_hidden_layers):
        shapes |= _layer_shapes(config, layer)
    if config.has_pooler:
        shapes |= _dense("pooler/dense", hidden, hidden)
    if config.head == "encoder":
        return shapes
    shapes = {f"bert/{path}": shape for path, shape in shapes.items()}
    if config.head == "sequence_classification":
        return shapes | _dense("classifier", hidden, config.num_labels)
    return shapes | {
        **_dense("cls/predictions/transform/dense", hidden, hidden),
        **_norm("cls/predictions/transform/LayerNorm", hidden),
        "cls/predictions/bias": (config.vocab_size,),
    }


def _embedding_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    return {
        "embeddings/word_embeddings/embedding": (config.vocab_size, config.hidden_size),
        "embeddings/position_embeddings/embedding": (config.max_position_embeddings, config.hidden_size),
        "embeddings/token_type_embeddings/embedding": (config.type_vocab_size, config.hidden_size),
        **_norm("embeddings/LayerNorm", config.hidden_size),
    }


def _layer_shapes(config: BertConfig, layer: int) -> dict[str, tuple[int, ...]]:
    path, hidden = f"encoder/layer/{layer}", config.hidden_size
    inner, width = config.num_attention_heads[layer] * config.head_size, config.intermediate_size[layer]
    return {
        **_dense(f"{path}/attention/self/query", hidden, inner),
        **_dense(f"{path}/attention/self/key", hidden, inner),
        **_dense(f"{path}/attention/self/value", hidden, inner),
        **_dense(f"{path}/attention/output/dense", inner, hidden),
        **_norm(f"{path}/attention/output/LayerNorm", hidden),
        **_dense(f"{path}/intermediate/dense", hidden, width),
        **_dense(f"{path}/output/dense", width, hidden),
        **_norm(f"{path}/output/LayerNorm", hidden),
    }


def _dense(path: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{path}/kernel": (inputs, outputs), f"{path}/bias": (outputs,)}


def _norm(path: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{path}/scale": (size,), f"{path}/bias": (size,)}
