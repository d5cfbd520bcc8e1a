"""Structured pruning: units, what they cost, scores, which to keep, and taking the others out of the arrays."""

from jaxcompress._src.units.costs import flop_costs as flop_costs
from jaxcompress._src.units.costs import parameter_costs as parameter_costs
from jaxcompress._src.units.discover import discover_units as discover_units
from jaxcompress._src.units.group import UnitGroup as UnitGroup
from jaxcompress._src.units.group import UnitSlices as UnitSlices
from jaxcompress._src.units.one_shot import fisher_shrink as fisher_shrink
from jaxcompress._src.units.one_shot import magnitude_shrink as magnitude_shrink
from jaxcompress._src.units.refit import refit as refit
from jaxcompress._src.units.scores import fisher_unit_scores as fisher_unit_scores
from jaxcompress._src.units.scores import gate_gradients as gate_gradients
from jaxcompress._src.units.scores import magnitude_unit_scores as magnitude_unit_scores
from jaxcompress._src.units.scores import taylor_unit_scores as taylor_unit_scores
from jaxcompress._src.units.select import select_units as select_units
from jaxcompress._src.units.shrink import shrink as shrink
from jaxcompress._src.units.swap import swap_units as swap_units
