"""Quantization of weights and of matmul inputs: formats, ranges, rounding; in training, and after it."""
