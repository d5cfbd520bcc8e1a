"""Learned gates on units: hard concrete switches, the price of open ones, the choice at the end."""

from jaxcompress._src.gates.budget import units_within as units_within
from jaxcompress._src.gates.layers import layer_units as layer_units
from jaxcompress._src.gates.measure import flops as flops
from jaxcompress._src.gates.measure import parameters as parameters
from jaxcompress._src.gates.targets import lagrangian as lagrangian
from jaxcompress._src.gates.transform import hard_concrete as hard_concrete
from jaxcompress._src.gates.transform import multiply_gates as multiply_gates
from jaxcompress._src.gates.values import gate_values as gate_values
