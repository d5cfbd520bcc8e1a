"""Compressed models as files that other libraries load."""

from jaxcompress._src.export.gguf import save_gguf as save_gguf
from jaxcompress._src.export.huggingface import save_huggingface as save_huggingface
from jaxcompress._src.export.info import ExportedLeaf as ExportedLeaf
from jaxcompress._src.export.info import ExportInfo as ExportInfo
from jaxcompress._src.export.round_scales import round_scales as round_scales
