"""Units: which slices of which leaves live and die together."""
