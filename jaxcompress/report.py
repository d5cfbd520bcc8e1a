"""What compression costs and brings: sizes, latency, paired comparisons."""

from jaxcompress._src.arrays.protocol import describe_leaf as describe_leaf
from jaxcompress._src.report.divergence import kl_divergence as kl_divergence
from jaxcompress._src.report.latency import compare_latency as compare_latency
from jaxcompress._src.report.latency import latency as latency
from jaxcompress._src.report.paired import agreement as agreement
from jaxcompress._src.report.paired import paired_difference as paired_difference
from jaxcompress._src.report.perplexity import perplexity as perplexity
from jaxcompress._src.report.size import size_report as size_report
