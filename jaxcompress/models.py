"""Flax BERT whose sizes may differ from layer to layer, and its Hugging Face files."""

from jaxcompress._src.models.bert_heads import make_module as make_module
from jaxcompress._src.models.bert_units import bert_units as bert_units
from jaxcompress._src.models.config import BertConfig as BertConfig
from jaxcompress._src.models.gpt2_units import gpt2_units as gpt2_units
from jaxcompress._src.models.hf_read import from_pretrained as from_pretrained
from jaxcompress._src.models.hf_write import save_pretrained as save_pretrained
from jaxcompress._src.models.shapes import resized as resized
