"""Compressed models as files that other libraries and runtimes load."""

from jaxcompress._src.export.gguf import save_gguf as save_gguf
from jaxcompress._src.export.huggingface import save_huggingface as save_huggingface
from jaxcompress._src.export.info import ExportedLeaf as ExportedLeaf
from jaxcompress._src.export.info import ExportInfo as ExportInfo
from jaxcompress._src.export.litert import FloatLeafWarning as FloatLeafWarning
from jaxcompress._src.export.litert import LitertInfo as LitertInfo
from jaxcompress._src.export.litert import save_litert as save_litert
from jaxcompress._src.export.onnx.options import OnnxLeaf as OnnxLeaf
from jaxcompress._src.export.onnx.save import OnnxInfo as OnnxInfo
from jaxcompress._src.export.onnx.save import save_onnx as save_onnx
from jaxcompress._src.export.round_scales import round_scales as round_scales
from jaxcompress._src.export.stablehlo import StablehloInfo as StablehloInfo
from jaxcompress._src.export.stablehlo import load_stablehlo as load_stablehlo
from jaxcompress._src.export.stablehlo import save_stablehlo as save_stablehlo
