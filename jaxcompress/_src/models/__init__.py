"""Flax BERT whose sizes may differ from layer to layer, and its Hugging Face files."""
