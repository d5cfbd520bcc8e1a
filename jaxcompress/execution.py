"""How products with compressed leaves are computed."""

from jaxcompress._src.execution.expand import expand_sparse as expand_sparse
from jaxcompress._src.execution.kernels.choice import PlannedMatmul as PlannedMatmul
from jaxcompress._src.execution.plan import Plan as Plan
from jaxcompress._src.execution.plan import plan as plan
