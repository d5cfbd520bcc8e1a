"""Training a small model on the outputs of a large one, compressing it on the way."""
