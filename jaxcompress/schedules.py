"""Functions of the step, thin over `optax.schedules`."""

from jaxcompress._src.schedules import UnfinishedScheduleWarning as UnfinishedScheduleWarning
from jaxcompress._src.schedules import constant as constant
from jaxcompress._src.schedules import cubic as cubic
