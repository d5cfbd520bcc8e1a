"""What compression costs and brings: sizes, latency, paired comparisons."""

from jaxcompress.report._describe import describe_leaf as describe_leaf
from jaxcompress.report._disk import disk_bytes as disk_bytes
from jaxcompress.report._divergence import Divergence as Divergence
from jaxcompress.report._divergence import kl_divergence as kl_divergence
from jaxcompress.report._latency import Latency as Latency
from jaxcompress.report._latency import LatencyComparison as LatencyComparison
from jaxcompress.report._latency import compare_latency as compare_latency
from jaxcompress.report._latency import latency as latency
from jaxcompress.report._mean import SampleMean as SampleMean
from jaxcompress.report._mean import sample_mean as sample_mean
from jaxcompress.report._paired import Agreement as Agreement
from jaxcompress.report._paired import PairedDifference as PairedDifference
from jaxcompress.report._paired import agreement as agreement
from jaxcompress.report._paired import paired_difference as paired_difference
from jaxcompress.report._size import LeafSize as LeafSize
from jaxcompress.report._size import SizeReport as SizeReport
from jaxcompress.report._size import SizeTotal as SizeTotal
from jaxcompress.report._size import size_report as size_report
from jaxcompress.report._table import Table as Table
from jaxcompress.report._table import format_bytes as format_bytes
from jaxcompress.report._table import format_table as format_table
from jaxcompress.report._table import leaf_table as leaf_table
from jaxcompress.report._table import total_table as total_table
