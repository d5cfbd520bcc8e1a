"""What a one-shot method did to a leaf."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafInfo:
    """What happened to one leaf. Errors are relative: ||X W - X W'|| / ||X W|| over the calibration rows.

    Attributes:
        sparsity: share of zeros.
        error_before: with the same zeros and all other weights as they were; None without "gram" statistics, and where
            no row was seen.
        error: with the new weights; None in the same cases.
        damping: share of the mean diagonal that was added to X'X; None where nothing is inverted.
        retries: how often the damping had to grow; above 0 the matrix was singular beyond the damping asked for.
        unseen_inputs: number of inputs that are 0 in every row, over all stack entries; see the argument `unseen`.
        unseen_entries: number of stack entries whose inputs are all such (an expert that no row reached).
    """

    sparsity: float
    error_before: float | None = None
    error: float | None = None
    damping: float | None = None
    retries: int = 0
    unseen_inputs: int = 0
    unseen_entries: int = 0
