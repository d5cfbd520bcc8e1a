"""Compressed leaves: what is stored, and how the plain array comes back."""

from jaxcompress.arrays._additive import AdditiveCodebookArray as AdditiveCodebookArray
from jaxcompress.arrays._bitmask import BitmaskSparseArray as BitmaskSparseArray
from jaxcompress.arrays._codebook import CodebookArray as CodebookArray
from jaxcompress.arrays._codebook import look_up as look_up
from jaxcompress.arrays._input_quantized import InputQuantizedArray as InputQuantizedArray
from jaxcompress.arrays._input_quantized import InputQuantizer as InputQuantizer
from jaxcompress.arrays._input_quantized import input_rounded as input_rounded
from jaxcompress.arrays._low_rank import LowRankArray as LowRankArray
from jaxcompress.arrays._n_of_m import NMSparseArray as NMSparseArray
from jaxcompress.arrays._packed import PackedArray as PackedArray
from jaxcompress.arrays._packed import codes_per_block as codes_per_block
from jaxcompress.arrays._packed import pack as pack
from jaxcompress.arrays._quantized import QuantizedArray as QuantizedArray
from jaxcompress.arrays._quantized import dequantize as dequantize
from jaxcompress.arrays._quantized import per_block as per_block
from jaxcompress.arrays._quantized import split_blocks as split_blocks
from jaxcompress.arrays._sharding import component_shardings as component_shardings
from jaxcompress.arrays._sparse import SparseArray as SparseArray
from jaxcompress.arrays._sparse import sparsify as sparsify
from jaxcompress.arrays._sparse import sparsify_like as sparsify_like
from jaxcompress.arrays._straight_through import straight_through as straight_through
from jaxcompress.arrays._validate import validate_array as validate_array
