"""Model compression for JAX, as pure functions over parameter trees."""

from jaxcompress import arrays as arrays
from jaxcompress import execution as execution
from jaxcompress import schedules as schedules
from jaxcompress import trace as trace
from jaxcompress import tree as tree
from jaxcompress import types as types
from jaxcompress.execution import execute as execute
from jaxcompress.execution import materialize as materialize
