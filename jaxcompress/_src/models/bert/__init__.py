"""BERT in Flax, whose sizes may differ from layer to layer."""
