"""Learned gates on units: hard concrete switches, the price of open ones, their values after training."""

from jaxcompress._src.units.gates import gate_values as gate_values
from jaxcompress._src.units.gates import hard_concrete as hard_concrete
from jaxcompress._src.units.gates import multiply_gates as multiply_gates
from jaxcompress._src.units.lagrangian import lagrangian as lagrangian
from jaxcompress._src.units.lagrangian import smallest_with as smallest_with
from jaxcompress._src.units.layers import layer_units as layer_units
