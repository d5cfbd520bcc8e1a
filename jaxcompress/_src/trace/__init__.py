"""What a model does with each leaf, read from its jaxpr."""
