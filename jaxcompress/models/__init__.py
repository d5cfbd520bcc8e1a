"""Flax BERT whose sizes may differ from layer to layer, and its Hugging Face files."""

from jaxcompress.models._bert import BertModel as BertModel
from jaxcompress.models._bert_heads import BertForMaskedLM as BertForMaskedLM
from jaxcompress.models._bert_heads import BertForSequenceClassification as BertForSequenceClassification
from jaxcompress.models._bert_heads import make_module as make_module
from jaxcompress.models._config import BertConfig as BertConfig
from jaxcompress.models._hf_config import config_from_huggingface as config_from_huggingface
from jaxcompress.models._hf_config import config_to_huggingface as config_to_huggingface
from jaxcompress.models._hf_read import from_pretrained as from_pretrained
from jaxcompress.models._hf_write import save_pretrained as save_pretrained
from jaxcompress.models._parameters import parameter_shapes as parameter_shapes
from jaxcompress.models._shapes import config_from_params as config_from_params
