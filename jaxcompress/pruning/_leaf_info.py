"""What a one-shot method did to a leaf."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafInfo:
    """What happened to one leaf. Errors are relative: ||X W - X W'|| / ||X W|| over the calibration rows.

    Attributes:
        sparsity: share of zeros.
        error_before: with the same zeros and all other weights as they were; None without "gram" statistics.
        error: with the new weights; likewise.
        damping: share of the mean diagonal that was added to X'X; None where nothing is inverted.
        retries: how often the damping had to grow; above 0 the matrix was singular beyond the damping asked for.
        dead_inputs: number of inputs that are 0 in every row (all their weights may go).
    """

    sparsity: float
    error_before: float | None = None
    error: float | None = None
    damping: float | None = None
    retries: int = 0
    dead_inputs: int = 0
