"""Low-rank leaves: factors by activations or Fisher information, and how many directions each leaf keeps."""

from jaxcompress.lowrank._factorize import Directions as Directions
from jaxcompress.lowrank._factorize import directions as directions
from jaxcompress.lowrank._factorize import root_of_gram as root_of_gram
from jaxcompress.lowrank._factorize import truncate as truncate
from jaxcompress.lowrank._factors import compress_factors as compress_factors
from jaxcompress.lowrank._gates import expected_ranks as expected_ranks
from jaxcompress.lowrank._gates import rank_gates as rank_gates
from jaxcompress.lowrank._leaves import LowRankInfo as LowRankInfo
from jaxcompress.lowrank._ranks import RankRule as RankRule
from jaxcompress.lowrank._ranks import Spectrum as Spectrum
from jaxcompress.lowrank._ranks import budget as budget
from jaxcompress.lowrank._ranks import energy as energy
from jaxcompress.lowrank._ranks import fixed_rank as fixed_rank
from jaxcompress.lowrank._ranks import parameter_share as parameter_share
from jaxcompress.lowrank._ranks import spectrum as spectrum
from jaxcompress.lowrank._residual import CompressFn as CompressFn
from jaxcompress.lowrank._residual import with_residual as with_residual
from jaxcompress.lowrank._svd import activation_svd as activation_svd
from jaxcompress.lowrank._svd import fisher_svd as fisher_svd
from jaxcompress.lowrank._svd import svd as svd
