"""Flax BERT whose sizes may differ from layer to layer, and its Hugging Face files."""

from jaxcompress.models._bert import BertModel as BertModel
from jaxcompress.models._bert_heads import BertForMaskedLM as BertForMaskedLM
from jaxcompress.models._bert_heads import BertForSequenceClassification as BertForSequenceClassification
from jaxcompress.models._bert_heads import make_module as make_module
from jaxcompress.models._bert_units import bert_ffn_units as bert_ffn_units
from jaxcompress.models._bert_units import bert_head_units as bert_head_units
from jaxcompress.models._bert_units import bert_hidden_units as bert_hidden_units
from jaxcompress.models._bert_units import bert_layer_units as bert_layer_units
from jaxcompress.models._bert_units import bert_units as bert_units
from jaxcompress.models._config import BertConfig as BertConfig
from jaxcompress.models._gpt2_units import gpt2_units as gpt2_units
from jaxcompress.models._hf_config import config_from_huggingface as config_from_huggingface
from jaxcompress.models._hf_config import config_to_huggingface as config_to_huggingface
from jaxcompress.models._hf_config import read_config as read_config
from jaxcompress.models._hf_read import from_pretrained as from_pretrained
from jaxcompress.models._hf_write import save_pretrained as save_pretrained
from jaxcompress.models._parameters import parameter_shapes as parameter_shapes
from jaxcompress.models._shapes import config_from_params as config_from_params
from jaxcompress.models._shapes import resized as resized
