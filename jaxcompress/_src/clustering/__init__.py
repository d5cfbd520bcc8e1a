"""Weights that share a few values, and the shortest bytes for what is stored."""
