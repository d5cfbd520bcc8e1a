"""Families of models in Flax, whose sizes may differ from layer to layer, and their Hugging Face files."""

from jaxcompress._src.models.bert.config import BertConfig as BertConfig
from jaxcompress._src.models.decoder.cache import init_cache as init_cache
from jaxcompress._src.models.decoder.generate import generate as generate
from jaxcompress._src.models.decoder.rotary import RopeScaling as RopeScaling
from jaxcompress._src.models.families import make_module as make_module
from jaxcompress._src.models.families import resized as resized
from jaxcompress._src.models.families import unit_groups as unit_groups
from jaxcompress._src.models.gpt2.config import GPT2Config as GPT2Config
from jaxcompress._src.models.gpt2.flax_units import gpt2_units as gpt2_units
from jaxcompress._src.models.hf.read import from_pretrained as from_pretrained
from jaxcompress._src.models.hf.write import save_pretrained as save_pretrained
from jaxcompress._src.models.llama.config import LlamaConfig as LlamaConfig
