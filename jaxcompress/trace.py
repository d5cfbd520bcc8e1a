"""What a model does with each leaf, read from its jaxpr."""

from jaxcompress._src.execution.execute import fallbacks as fallbacks
from jaxcompress._src.trace.coverage import coverage as coverage
from jaxcompress._src.trace.folds import folds as folds
from jaxcompress._src.trace.layout import LeafLayout as LeafLayout
from jaxcompress._src.trace.layouts import layouts as layouts
from jaxcompress._src.trace.left_out import LeftOutWarning as LeftOutWarning
from jaxcompress._src.weights.selection import BlockError as BlockError
