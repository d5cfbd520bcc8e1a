"""Checkpoints that restore from their path alone: Orbax arrays beside one JSON manifest."""
