"""Array-level mathematics that several techniques share."""

from jaxcompress.solvers._budget import Choice as Choice
from jaxcompress.solvers._budget import cheapest_choice as cheapest_choice
from jaxcompress.solvers._cholesky import DampedFactor as DampedFactor
from jaxcompress.solvers._cholesky import damped_cholesky as damped_cholesky
from jaxcompress.solvers._cholesky import inverse_factor as inverse_factor
from jaxcompress.solvers._columns import KeepBlock as KeepBlock
from jaxcompress.solvers._columns import KeepRun as KeepRun
from jaxcompress.solvers._columns import QuantizeColumn as QuantizeColumn
from jaxcompress.solvers._columns import StartGroup as StartGroup
from jaxcompress.solvers._columns import block_sizes as block_sizes
from jaxcompress.solvers._columns import solve_columns as solve_columns
from jaxcompress.solvers._counting import count_true as count_true
from jaxcompress.solvers._order import order_keys as order_keys
from jaxcompress.solvers._rank import keep_largest as keep_largest
from jaxcompress.solvers._runs import keep_in_runs as keep_in_runs
from jaxcompress.solvers._share import share_of as share_of
