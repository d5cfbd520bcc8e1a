"""Models in the formats of other runtimes."""

from jaxcompress._src.export.onnx.options import OnnxLeaf as OnnxLeaf
from jaxcompress._src.export.onnx.save import OnnxInfo as OnnxInfo
from jaxcompress._src.export.onnx.save import save_onnx as save_onnx
