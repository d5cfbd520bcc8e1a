"""Model compression for JAX, as pure functions over parameter trees."""

from typing import TYPE_CHECKING

from jaxcompress import arrays as arrays
from jaxcompress._src.execution.execute import execute as execute
from jaxcompress._src.execution.materialize import materialize as materialize
from jaxcompress._src.lazy import imported_on_use
from jaxcompress._src.transforms import chain as chain
from jaxcompress._src.transforms import identity as identity

if TYPE_CHECKING:
    from jaxcompress import calibration as calibration
    from jaxcompress import checkpoint as checkpoint
    from jaxcompress import clustering as clustering
    from jaxcompress import distillation as distillation
    from jaxcompress import export as export
    from jaxcompress import gates as gates
    from jaxcompress import lowrank as lowrank
    from jaxcompress import models as models
    from jaxcompress import pruning as pruning
    from jaxcompress import quantization as quantization
    from jaxcompress import recipe as recipe
    from jaxcompress import report as report
    from jaxcompress import schedules as schedules
    from jaxcompress import structured as structured
    from jaxcompress import trace as trace
    from jaxcompress import training as training
    from jaxcompress import tree as tree

__version__ = "0.1.0"
__getattr__, __dir__ = imported_on_use(__name__)
