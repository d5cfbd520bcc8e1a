"""Structured pruning: scores of units, which to keep, and taking the others out of the arrays."""
