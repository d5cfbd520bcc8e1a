"""Pruning: scores, masks, and pruning while training."""
