"""What decoders of all families share: their cache, causal attention, generation."""
