"""Running an unmodified model on compressed leaves."""

from jaxcompress.execution._execute import execute as execute
from jaxcompress.execution._execute import fallbacks as fallbacks
from jaxcompress.execution._materialize import materialize as materialize
from jaxcompress.execution._values import Fallback as Fallback
