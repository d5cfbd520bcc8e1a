"""Llama and its relatives as families: their rows in the table."""

from jaxcompress._src.models.family import Family
from jaxcompress._src.models.hf.names import flax_parameters
from jaxcompress._src.models.llama.config import MODEL_TYPES, LlamaConfig, heads_of
from jaxcompress._src.models.llama.files import check_tensors, unloadable
from jaxcompress._src.models.llama.model import llama_module
from jaxcompress._src.models.llama.parameters import parameter_shapes
from jaxcompress._src.models.llama.settings import llama_config, llama_settings
from jaxcompress._src.models.llama.shapes import resized_config
from jaxcompress._src.models.llama.units import (
    llama_attention_units,
    llama_column_units,
    llama_ffn_units,
    llama_head_units,
    llama_hidden_units,
)
from jaxcompress._src.tree.selectors import by_path, exclude

_TABLES = by_path(r"(.*/)?embed_tokens/embedding|lm_head/kernel")

LLAMAS = tuple(
    Family(
        model_type=model_type,
        prefix="model",
        config=LlamaConfig,
        heads=heads_of(name),
        config_from_settings=llama_config,
        settings_from_config=llama_settings,
        make_module=llama_module,
        parameters=lambda config: flax_parameters(parameter_shapes(config)),
        resized_config=resized_config,
        units={
            "heads": llama_head_units,
            "columns": llama_column_units,
            "attentions": llama_attention_units,
            "ffns": llama_ffn_units,
            "hidden": llama_hidden_units,
        },
        default_units=("heads", "columns"),
        head_components=("lm_head", "score"),
        check_tensors=check_tensors,
        unloadable=unloadable,
        parts={"decoder": exclude(_TABLES), "embedding": _TABLES},
    )
    for model_type, name in MODEL_TYPES.items()
)
