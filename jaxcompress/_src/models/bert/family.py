"""BERT and its variants as families: their rows in the table."""

import operator

from jaxcompress._src.models.bert.config import BertConfig
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
from jaxcompress._src.models.bert.variants import VARIANTS
from jaxcompress._src.models.family import Family
from jaxcompress._src.models.hf.names import flax_parameters
from jaxcompress._src.tree.selectors import by_path, exclude

_TABLES = by_path(r"(.*/)?embedding")


def _family(model_type: str) -> Family:
    variant = VARIANTS[model_type]
    return Family(
        model_type=model_type,
        prefix=variant.prefix,
        config=BertConfig,
        heads=variant.heads,
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
        head_components=variant.head_components,
        check_tensors=check_tensors,
        unloadable=unloadable,
        parts={"encoder": exclude(_TABLES), "embedding": _TABLES},
        max_tokens=operator.attrgetter("max_tokens"),
    )


BERT, ROBERTA, XLM_ROBERTA, DISTILBERT = map(_family, ("bert", "roberta", "xlm-roberta", "distilbert"))
