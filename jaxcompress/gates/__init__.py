"""Learned gates on units: hard concrete switches, the price of open ones, the choice at the end."""

from jaxcompress.gates._budget import units_within as units_within
from jaxcompress.gates._hard_concrete import STANDARD as STANDARD
from jaxcompress.gates._hard_concrete import Form as Form
from jaxcompress.gates._hard_concrete import HardConcrete as HardConcrete
from jaxcompress.gates._hard_concrete import cumulative as cumulative
from jaxcompress.gates._hard_concrete import deterministic_gates as deterministic_gates
from jaxcompress.gates._hard_concrete import initial_log_alpha as initial_log_alpha
from jaxcompress.gates._hard_concrete import nonzero_probability as nonzero_probability
from jaxcompress.gates._hard_concrete import quantile as quantile
from jaxcompress.gates._hard_concrete import sample_gates as sample_gates
from jaxcompress.gates._hard_concrete import soft_gates as soft_gates
from jaxcompress.gates._layers import layer_units as layer_units
from jaxcompress.gates._measure import Measure as Measure
from jaxcompress.gates._measure import expected_size as expected_size
from jaxcompress.gates._measure import flops as flops
from jaxcompress.gates._measure import parameters as parameters
from jaxcompress.gates._penalty import Gated as Gated
from jaxcompress.gates._penalty import Penalty as Penalty
from jaxcompress.gates._penalty import lambda_penalty as lambda_penalty
from jaxcompress.gates._targets import lagrangian as lagrangian
from jaxcompress.gates._targets import shape_lagrangian as shape_lagrangian
from jaxcompress.gates._targets import smallest_with as smallest_with
from jaxcompress.gates._transform import hard_concrete as hard_concrete
from jaxcompress.gates._transform import multiply_gates as multiply_gates
from jaxcompress.gates._values import gate_values as gate_values
from jaxcompress.gates._values import kept_units as kept_units
