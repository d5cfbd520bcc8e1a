"""Quantization of weights: specs, round to nearest, fake quantization, fixed point; GPTQ and other one-shot methods."""

from jaxcompress.quantization._blocks import packing_axis as packing_axis
from jaxcompress.quantization._blocks import scale_shape as scale_shape
from jaxcompress.quantization._fake_quant import fake_quantize_array as fake_quantize_array
from jaxcompress.quantization._fake_quant import straight_through as straight_through
from jaxcompress.quantization._fixed_point import fixed_point_decode as fixed_point_decode
from jaxcompress.quantization._fixed_point import fixed_point_encode as fixed_point_encode
from jaxcompress.quantization._gptq import gptq as gptq
from jaxcompress.quantization._gptq_matrix import Groups as Groups
from jaxcompress.quantization._gptq_matrix import Order as Order
from jaxcompress.quantization._quantize import fake_quantize as fake_quantize
from jaxcompress.quantization._quantize import fixed_point as fixed_point
from jaxcompress.quantization._quantize import quantize as quantize
from jaxcompress.quantization._range_search import RangeSearch as RangeSearch
from jaxcompress.quantization._reconstruct import BEST_RANGES as BEST_RANGES
from jaxcompress.quantization._reconstruct import reconstruct as reconstruct
from jaxcompress.quantization._round_to_nearest import quantize_array as quantize_array
from jaxcompress.quantization._round_to_nearest import round_to_codes as round_to_codes
from jaxcompress.quantization._round_to_nearest import store_codes as store_codes
from jaxcompress.quantization._rounding_info import RoundingInfo as RoundingInfo
from jaxcompress.quantization._scales import block_scales as block_scales
from jaxcompress.quantization._spec import QuantSpec as QuantSpec
from jaxcompress.quantization._transform import quantization_aware as quantization_aware
