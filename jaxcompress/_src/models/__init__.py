"""Families of models in Flax, whose sizes may differ from layer to layer, and their Hugging Face files."""
