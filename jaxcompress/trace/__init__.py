"""What a model does with each leaf, read from its jaxpr."""

from jaxcompress.trace._coverage import Coverage as Coverage
from jaxcompress.trace._coverage import LeafCoverage as LeafCoverage
from jaxcompress.trace._coverage import coverage as coverage
from jaxcompress.trace._folds import Fold as Fold
from jaxcompress.trace._folds import FoldedLeaf as FoldedLeaf
from jaxcompress.trace._folds import folds as folds
from jaxcompress.trace._graph import leaf_uses as leaf_uses
from jaxcompress.trace._layout import LeafLayout as LeafLayout
from jaxcompress.trace._layout import default_layout as default_layout
from jaxcompress.trace._layouts import layouts as layouts
from jaxcompress.trace._left_out import LeftOutWarning as LeftOutWarning
from jaxcompress.trace._left_out import large_left_out as large_left_out
from jaxcompress.trace._left_out import listed as listed
from jaxcompress.trace._left_out import warn_left_out as warn_left_out
from jaxcompress.trace._origin import Origin as Origin
from jaxcompress.trace._origin import rearrange as rearrange
from jaxcompress.trace._origin import reshape_runs as reshape_runs
from jaxcompress.trace._selection import selected_layouts as selected_layouts
from jaxcompress.trace._walk import Body as Body
from jaxcompress.trace._walk import as_body as as_body
from jaxcompress.trace._walk import called_body as called_body
from jaxcompress.trace._walk import walk as walk
