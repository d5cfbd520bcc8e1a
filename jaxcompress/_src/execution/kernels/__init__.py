"""Kernels that replace the plain products of compressed arrays."""
