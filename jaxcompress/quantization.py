"""Quantization of weights and of matmul inputs: formats, ranges, rounding; in training, and after it."""

from jaxcompress._src.quantization.bias import correct_biases as correct_biases
from jaxcompress._src.quantization.bit_allocation import allocate_bits as allocate_bits
from jaxcompress._src.quantization.bit_allocation import fisher_sensitivity as fisher_sensitivity
from jaxcompress._src.quantization.bit_allocation import loss_sensitivity as loss_sensitivity
from jaxcompress._src.quantization.gptq import gptq as gptq
from jaxcompress._src.quantization.gptq_sequential import gptq_sequential as gptq_sequential
from jaxcompress._src.quantization.hqq import hqq as hqq
from jaxcompress._src.quantization.input_ranges import input_ranges as input_ranges
from jaxcompress._src.quantization.input_transforms import lsq_inputs as lsq_inputs
from jaxcompress._src.quantization.input_transforms import pact_inputs as pact_inputs
from jaxcompress._src.quantization.inputs import quantize_inputs as quantize_inputs
from jaxcompress._src.quantization.learned_rounding import learned_rounding as learned_rounding
from jaxcompress._src.quantization.lsq import lsq as lsq
from jaxcompress._src.quantization.quantize import fake_quantize as fake_quantize
from jaxcompress._src.quantization.quantize import fixed_point as fixed_point
from jaxcompress._src.quantization.quantize import quantize as quantize
from jaxcompress._src.quantization.range_search import RangeSearch as RangeSearch
from jaxcompress._src.quantization.reconstruct import reconstruct as reconstruct
from jaxcompress._src.quantization.rounding_info import RoundingInfo as RoundingInfo
from jaxcompress._src.quantization.rounding_info import rounding_errors as rounding_errors
from jaxcompress._src.quantization.smooth import awq as awq
from jaxcompress._src.quantization.smooth import smooth as smooth
from jaxcompress._src.quantization.spec import QuantSpec as QuantSpec
from jaxcompress._src.quantization.transform import quantization_aware as quantization_aware
