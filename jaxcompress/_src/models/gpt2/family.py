"""GPT-2 as a family: its row in the table."""

from jaxcompress._src.models.family import Family
from jaxcompress._src.models.gpt2.config import HEADS, GPT2Config
from jaxcompress._src.models.gpt2.files import check_tensors, unloadable
from jaxcompress._src.models.gpt2.model import gpt2_module
from jaxcompress._src.models.gpt2.parameters import gpt2_parameters
from jaxcompress._src.models.gpt2.settings import gpt2_config, gpt2_settings
from jaxcompress._src.models.gpt2.shapes import resized_config
from jaxcompress._src.models.gpt2.units import (
    gpt2_attention_units,
    gpt2_column_units,
    gpt2_ffn_units,
    gpt2_head_units,
    gpt2_hidden_units,
)
from jaxcompress._src.tree.selectors import by_path, exclude

_TABLES = by_path(r"(.*/)?w[tp]e/embedding|lm_head/kernel")

GPT2 = Family(
    model_type="gpt2",
    prefix="transformer",
    config=GPT2Config,
    heads=HEADS,
    config_from_settings=gpt2_config,
    settings_from_config=gpt2_settings,
    make_module=gpt2_module,
    parameters=gpt2_parameters,
    resized_config=resized_config,
    units={
        "heads": gpt2_head_units,
        "columns": gpt2_column_units,
        "attentions": gpt2_attention_units,
        "ffns": gpt2_ffn_units,
        "hidden": gpt2_hidden_units,
    },
    default_units=("heads", "columns"),
    head_components=("lm_head", "score"),
    check_tensors=check_tensors,
    unloadable=unloadable,
    parts={"decoder": exclude(_TABLES), "embedding": _TABLES},
)
