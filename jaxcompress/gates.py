"""Learned gates on units: hard concrete switches, the price of open ones, the choice at the end."""

from jaxcompress._src.units.budget import units_within as units_within
from jaxcompress._src.units.gates import hard_concrete as hard_concrete
from jaxcompress._src.units.gates import multiply_gates as multiply_gates
from jaxcompress._src.units.layers import layer_units as layer_units
from jaxcompress._src.units.measure import flops as flops
from jaxcompress._src.units.measure import parameters as parameters
from jaxcompress._src.units.targets import lagrangian as lagrangian
from jaxcompress._src.units.values import gate_values as gate_values
