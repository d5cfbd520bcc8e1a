"""Checkpoints that restore from their path alone: Orbax arrays beside one JSON manifest."""

from jaxcompress._src.checkpoint.errors import CheckpointError as CheckpointError
from jaxcompress._src.checkpoint.restore import restore as restore
from jaxcompress._src.checkpoint.save import save as save
