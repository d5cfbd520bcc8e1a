"""What compression costs and brings: sizes, latency, paired comparisons."""
