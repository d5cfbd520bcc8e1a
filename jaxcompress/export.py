"""Models for other runtimes: StableHLO, LiteRT."""

from jaxcompress._src.export.litert import FloatLeafWarning as FloatLeafWarning
from jaxcompress._src.export.litert import LitertInfo as LitertInfo
from jaxcompress._src.export.litert import save_litert as save_litert
from jaxcompress._src.export.stablehlo import StablehloInfo as StablehloInfo
from jaxcompress._src.export.stablehlo import load_stablehlo as load_stablehlo
from jaxcompress._src.export.stablehlo import save_stablehlo as save_stablehlo
