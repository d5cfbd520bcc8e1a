"""Compressed leaves: what is stored, and how the plain array comes back."""

from jaxcompress._src.arrays.additive import AdditiveCodebookArray as AdditiveCodebookArray
from jaxcompress._src.arrays.bitmask import BitmaskSparseArray as BitmaskSparseArray
from jaxcompress._src.arrays.codebook import CodebookArray as CodebookArray
from jaxcompress._src.arrays.input_quantized import InputQuantizedArray as InputQuantizedArray
from jaxcompress._src.arrays.low_rank import LowRankArray as LowRankArray
from jaxcompress._src.arrays.n_of_m import NMSparseArray as NMSparseArray
from jaxcompress._src.arrays.quantized import QuantizedArray as QuantizedArray
from jaxcompress._src.arrays.sharding import component_shardings as component_shardings
from jaxcompress._src.arrays.sparse import sparsify as sparsify
