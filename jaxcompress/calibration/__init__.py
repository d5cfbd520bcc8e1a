"""Evidence about a model: statistics of inputs, gradients."""

from jaxcompress.calibration._gradients import fisher as fisher
from jaxcompress.calibration._gradients import gradients as gradients
from jaxcompress.calibration._input_statistics import input_statistics as input_statistics
from jaxcompress.calibration._input_statistics import statistics_nbytes as statistics_nbytes
from jaxcompress.calibration._matrices import Calibrated as Calibrated
from jaxcompress.calibration._matrices import MatrixLeaf as MatrixLeaf
from jaxcompress.calibration._matrices import calibrated as calibrated
from jaxcompress.calibration._matrices import checked_weight as checked_weight
from jaxcompress.calibration._matrices import entries as entries
from jaxcompress.calibration._matrices import map_entries as map_entries
from jaxcompress.calibration._matrices import matrices as matrices
from jaxcompress.calibration._matrices import with_leaves as with_leaves
from jaxcompress.calibration._moments import Moments as Moments
from jaxcompress.calibration._moments import moments as moments
from jaxcompress.calibration._moments import relative_error as relative_error
from jaxcompress.calibration._pause import Pausing as Pausing
from jaxcompress.calibration._pause import Site as Site
from jaxcompress.calibration._pause import pausing as pausing
from jaxcompress.calibration._segments import Segment as Segment
from jaxcompress.calibration._segments import segments as segments
from jaxcompress.calibration._sequential import sequential as sequential
from jaxcompress.calibration._statistics import InputStatistics as InputStatistics
from jaxcompress.calibration._statistics import LookupCounts as LookupCounts
from jaxcompress.calibration._statistics import Statistic as Statistic
from jaxcompress.calibration._statistics import add_statistics as add_statistics
