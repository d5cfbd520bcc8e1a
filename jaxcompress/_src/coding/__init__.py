"""Small integers as few bytes: what the entropy-coded storage of checkpoints is made of."""
