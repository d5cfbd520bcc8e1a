"""Training runs: the loop, its checkpoints, what it reports."""
