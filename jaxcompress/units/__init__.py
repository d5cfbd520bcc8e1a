"""Units: which slices of which leaves live and die together."""

from jaxcompress.units._count import expected_parameters as expected_parameters
from jaxcompress.units._count import unit_parameters as unit_parameters
from jaxcompress.units._count import unit_sizes as unit_sizes
from jaxcompress.units._group import UnitGroup as UnitGroup
from jaxcompress.units._group import UnitSlices as UnitSlices
from jaxcompress.units._group import check_groups as check_groups
from jaxcompress.units._group import index_owners as index_owners
from jaxcompress.units._slicing import multiply_units as multiply_units
from jaxcompress.units._slicing import remove_units as remove_units
from jaxcompress.units._slicing import sum_units as sum_units
from jaxcompress.units._slicing import unit_masks as unit_masks
