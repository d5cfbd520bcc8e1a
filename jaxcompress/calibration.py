"""Evidence about a model: statistics of inputs, gradients."""

from jaxcompress._src.calibration.gradients import fisher as fisher
from jaxcompress._src.calibration.gradients import gradients as gradients
from jaxcompress._src.calibration.input_statistics import input_statistics as input_statistics
from jaxcompress._src.calibration.sequential import sequential as sequential
from jaxcompress._src.calibration.splice import spliced as spliced
from jaxcompress._src.calibration.statistics import InputStatistics as InputStatistics
from jaxcompress._src.calibration.statistics import LookupCounts as LookupCounts
