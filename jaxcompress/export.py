"""Compressed models as files that other libraries load."""

from jaxcompress._src.export.huggingface import save_huggingface as save_huggingface
from jaxcompress._src.export.info import ExportedLeaf as ExportedLeaf
from jaxcompress._src.export.info import ExportInfo as ExportInfo
