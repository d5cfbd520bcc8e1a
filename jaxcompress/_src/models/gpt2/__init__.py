"""GPT-2 in Flax, whose sizes may differ from layer to layer."""
