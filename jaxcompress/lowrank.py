"""Low-rank leaves: factors by activations or Fisher information, and how many directions each leaf keeps."""

from jaxcompress._src.lowrank.factors import compress_factors as compress_factors
from jaxcompress._src.lowrank.gates import rank_gates as rank_gates
from jaxcompress._src.lowrank.lora import lora as lora
from jaxcompress._src.lowrank.ranks import budget as budget
from jaxcompress._src.lowrank.ranks import energy as energy
from jaxcompress._src.lowrank.ranks import parameter_share as parameter_share
from jaxcompress._src.lowrank.residual import with_residual as with_residual
from jaxcompress._src.lowrank.svd import activation_svd as activation_svd
from jaxcompress._src.lowrank.svd import fisher_svd as fisher_svd
from jaxcompress._src.lowrank.svd import svd as svd
