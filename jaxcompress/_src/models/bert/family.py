"""BERT as a family: its row in the table."""

from jaxcompress._src.models.bert.config import HEADS, BertConfig
from jaxcompress._src.models.bert.files import check_tensors, unloadable
from jaxcompress._src.models.bert.heads import bert_module
from jaxcompress._src.models.bert.parameters import parameter_shapes
from jaxcompress._src.models.bert.settings import bert_config, bert_settings
from jaxcompress._src.models.bert.shapes import resized_config
from jaxcompress._src.models.bert.units import (
    bert_attention_units,
    bert_column_units,
    bert_ffn_units,
    bert_head_units,
    bert_hidden_units,
)
from jaxcompress._src.models.family import Family
from jaxcompress._src.models.hf.names import flax_parameters
from jaxcompress._src.tree.selectors import by_path, exclude

_TABLES = by_path(r"(.*/)?embedding")

BERT = Family(
    model_type="bert",
    prefix="bert",
    config=BertConfig,
    heads=HEADS,
    config_from_settings=bert_config,
    settings_from_config=bert_settings,
    make_module=bert_module,
    parameters=lambda config: flax_parameters(parameter_shapes(config)),
    resized_config=resized_config,
    units={
        "heads": bert_head_units,
        "columns": bert_column_units,
        "attentions": bert_attention_units,
        "ffns": bert_ffn_units,
        "hidden": bert_hidden_units,
    },
    default_units=("heads", "columns"),
    head_components=("pooler", "classifier", "cls", "qa_outputs"),
    check_tensors=check_tensors,
    unloadable=unloadable,
    parts={"encoder": exclude(_TABLES), "embedding": _TABLES},
)
