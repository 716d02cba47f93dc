"""Which of the texts that a model ranks high for an anchor become its negatives."""

from dataclasses import dataclass

from embtune.errors import ArgumentError

NEAR_DUPLICATE = "nearly the same as the anchor or a positive"
TOO_HIGH = "scored above max_score"
TOO_LOW = "scored below min_score"
TOO_CLOSE = "within the margin of the positive's score, or above it"


@dataclass(frozen=True)
class MiningRules:
    """Which candidates become negatives; named as in sentence-transformers' `mine_hard_negatives`.

    A candidate's rank counts from 0 and leaves out what is excluded from the start: the anchor itself and all of its
    positives.
    """

    num_negatives: int = 3
    """Negatives for each row."""
    range_min: int = 0
    """Candidates of a better rank are skipped."""
    range_max: int | None = None
    """Candidates from this rank on are not looked at; None is `range_min` + 10 × `num_negatives`."""
    min_score: float | None = None
    """Candidates of a lower similarity to the anchor are skipped."""
    max_score: float | None = None
    """Candidates of a higher similarity to the anchor are skipped."""
    absolute_margin: float | None = None
    """A negative scores at most the row's positive minus this."""
    relative_margin: float | None = 0.05
    """A negative scores at most the row's positive, p, minus this share of |p| (Moreira et al., "NV-Retriever", 2024,
    found 0.05 to leave out most texts that answer after all)."""
    near_duplicates: float = 0.8
    """Candidates whose words overlap so far with the anchor's or a positive's are skipped: Jaccard similarity, over 0,
    up to 1."""

    def __post_init__(self) -> None:
        if self.num_negatives < 1:
            raise ArgumentError(f"num_negatives={self.num_negatives} must be at least 1.")
        if self.range_min < 0:
            raise ArgumentError(f"range_min={self.range_min} must be at least 0; ranks count from 0.")
        if self.ranks < self.num_negatives:
            raise ArgumentError(
                f"range_min={self.range_min} and range_max={self.range_max} leave {max(self.ranks, 0)} candidates for "
                f"num_negatives={self.num_negatives}. Raise range_max."
            )
        if self.min_score is not None and self.max_score is not None and not self.min_score <= self.max_score:
            raise ArgumentError(f"min_score={self.min_score} is more than max_score={self.max_score}.")
        for name in ("absolute_margin", "relative_margin"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ArgumentError(f"{name}={value} must be at least 0.")
        if not 0 < self.near_duplicates <= 1:
            raise ArgumentError(f"near_duplicates={self.near_duplicates} must be over 0 and at most 1.")

    @property
    def last_rank(self) -> int:
        """The rank at which candidates end."""
        return self.range_min + 10 * self.num_negatives if self.range_max is None else self.range_max

    @property
    def ranks(self) -> int:
        """Number of ranks from which negatives are taken."""
        return self.last_rank - self.range_min

    def objection(self, score: float, positive_score: float) -> str | None:
        """What a candidate's score has against it, or None."""
        if self.max_score is not None and score > self.max_score:
            return TOO_HIGH
        if self.min_score is not None and score < self.min_score:
            return TOO_LOW
        margins = (self.absolute_margin or 0.0, (self.relative_margin or 0.0) * abs(positive_score))
        has_margin = self.absolute_margin is not None or self.relative_margin is not None
        return TOO_CLOSE if has_margin and score > positive_score - max(margins) else None
