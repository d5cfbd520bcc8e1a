"""The one error of a checkpoint that cannot be restored."""


class CheckpointError(ValueError):
    """A checkpoint is damaged, foreign, or does not fit what was asked.

    The message names the checkpoint and the leaf, what was found, and what would be right.
    """
