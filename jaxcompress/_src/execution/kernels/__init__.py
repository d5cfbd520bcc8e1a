"""Kernels of single backends; nothing uses them unless asked by name."""
