"""Evidence about a model: statistics of inputs, gradients."""
