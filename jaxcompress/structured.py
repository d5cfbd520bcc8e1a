"""Structured pruning: scores of units, which to keep, and taking the others out of the arrays."""

from jaxcompress._src.structured.costs import flop_costs as flop_costs
from jaxcompress._src.structured.costs import parameter_costs as parameter_costs
from jaxcompress._src.structured.rearrange import rearrange as rearrange
from jaxcompress._src.structured.reconstruct import reconstruct as reconstruct
from jaxcompress._src.structured.scores import fisher_matrix as fisher_matrix
from jaxcompress._src.structured.scores import fisher_unit_scores as fisher_unit_scores
from jaxcompress._src.structured.scores import gate_gradients as gate_gradients
from jaxcompress._src.structured.scores import magnitude_unit_scores as magnitude_unit_scores
from jaxcompress._src.structured.scores import taylor_unit_scores as taylor_unit_scores
from jaxcompress._src.structured.select import select_units as select_units
from jaxcompress._src.structured.shrink import shrink as shrink
from jaxcompress._src.units.group import UnitGroup as UnitGroup
from jaxcompress._src.units.slicing import remove_units as remove_units
from jaxcompress._src.units.slicing import sum_units as sum_units
