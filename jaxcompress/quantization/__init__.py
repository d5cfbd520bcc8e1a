"""Quantization of weights and of matmul inputs: formats, ranges, rounding, training."""

from jaxcompress.quantization._blocks import packing_axis as packing_axis
from jaxcompress.quantization._blocks import scale_shape as scale_shape
from jaxcompress.quantization._entropy import entropy_clip as entropy_clip
from jaxcompress.quantization._fake_quant import fake_quantize_array as fake_quantize_array
from jaxcompress.quantization._fake_quant import straight_through as straight_through
from jaxcompress.quantization._fixed_point import fixed_point_decode as fixed_point_decode
from jaxcompress.quantization._fixed_point import fixed_point_encode as fixed_point_encode
from jaxcompress.quantization._input_ranges import input_ranges as input_ranges
from jaxcompress.quantization._input_transforms import lsq_inputs as lsq_inputs
from jaxcompress.quantization._input_transforms import pact_inputs as pact_inputs
from jaxcompress.quantization._input_transforms import quantized_inputs as quantized_inputs
from jaxcompress.quantization._inputs import InputRange as InputRange
from jaxcompress.quantization._inputs import InputRounding as InputRounding
from jaxcompress.quantization._inputs import quantize_inputs as quantize_inputs
from jaxcompress.quantization._learned import learned_quantize_array as learned_quantize_array
from jaxcompress.quantization._lsq import LearnedSteps as LearnedSteps
from jaxcompress.quantization._lsq import lsq as lsq
from jaxcompress.quantization._quantize import fake_quantize as fake_quantize
from jaxcompress.quantization._quantize import fixed_point as fixed_point
from jaxcompress.quantization._quantize import quantize as quantize
from jaxcompress.quantization._round_to_nearest import quantize_array as quantize_array
from jaxcompress.quantization._round_to_nearest import store_codes as store_codes
from jaxcompress.quantization._rounding import round_to_codes as round_to_codes
from jaxcompress.quantization._scales import block_scales as block_scales
from jaxcompress.quantization._spec import QuantSpec as QuantSpec
from jaxcompress.quantization._transform import quantization_aware as quantization_aware
