"""Evidence about a model: statistics of inputs, gradients."""

from jaxcompress.calibration._gradients import fisher as fisher
from jaxcompress.calibration._gradients import gradients as gradients
from jaxcompress.calibration._histogram import Histogram as Histogram
from jaxcompress.calibration._input_statistics import batch_statistics as batch_statistics
from jaxcompress.calibration._input_statistics import input_statistics as input_statistics
from jaxcompress.calibration._input_statistics import statistics_nbytes as statistics_nbytes
from jaxcompress.calibration._sequential import sequential as sequential
from jaxcompress.calibration._statistics import InputStatistics as InputStatistics
from jaxcompress.calibration._statistics import LookupCounts as LookupCounts
from jaxcompress.calibration._statistics import Statistic as Statistic
from jaxcompress.calibration._statistics import add_statistics as add_statistics
