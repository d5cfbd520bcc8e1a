"""Structured pruning: scores of units, which to keep, and taking the others out of the arrays."""

from jaxcompress.structured._costs import flop_costs as flop_costs
from jaxcompress.structured._costs import parameter_costs as parameter_costs
from jaxcompress.structured._rearrange import rearrange as rearrange
from jaxcompress.structured._reconstruct import reconstruct as reconstruct
from jaxcompress.structured._scores import fisher_matrix as fisher_matrix
from jaxcompress.structured._scores import fisher_unit_scores as fisher_unit_scores
from jaxcompress.structured._scores import gate_gradients as gate_gradients
from jaxcompress.structured._scores import magnitude_unit_scores as magnitude_unit_scores
from jaxcompress.structured._scores import taylor_unit_scores as taylor_unit_scores
from jaxcompress.structured._select import Selection as Selection
from jaxcompress.structured._select import select_units as select_units
from jaxcompress.structured._shrink import mask_units as mask_units
from jaxcompress.structured._shrink import shrink as shrink
