"""What the results of all evaluations have in common, so that any two of a kind can be compared."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from embtune.evaluate.bootstrap import Statistic, intervals


@dataclass(frozen=True, eq=False)
class ItemScores:
    """What each query, pair or text scores by itself; the lists are in the order of the data."""

    metric: str
    """Name of the score."""
    scores: np.ndarray
    """One for each item (N,); higher is better."""
    names: list[str]
    """How reports call the items: by id, or by index in the lists that were given."""
    texts: list[str]
    """The items' texts, for people."""

    @classmethod
    def of_rows(cls, metric: str, scores: np.ndarray, texts: Sequence[str]) -> "ItemScores":
        """Of items that are known by their index alone."""
        return cls(metric, scores, [str(row) for row in range(len(texts))], list(texts))


@dataclass(frozen=True, eq=False)
class EvaluationResult(ABC):
    """Metrics of one model on one data set; higher is better in all of them."""

    kind: ClassVar[str]
    """What was evaluated, such as `retrieval`."""

    metrics: dict[str, float]
    """Metric -> value, the main one first."""
    items: int
    """Number of queries, pairs or texts behind the metrics."""
    fingerprint: str
    """Identifies the data; results are comparable when it is the same."""

    @abstractmethod
    def statistics(self) -> dict[str, Statistic]:
        """The same metrics as functions of bootstrap draws over the items."""

    def by_item(self) -> ItemScores | None:
        """The scores of single items, or None where an item has none of its own, as in a clustering."""
        return None

    def intervals(self, **settings: Any) -> dict[str, tuple[float, float]]:
        """Metric -> bootstrap interval over the items; `settings` are those of `bootstrap.intervals`."""
        return intervals(self.statistics(), self.items, **settings)

    def to_dict(self) -> dict[str, Any]:
        """Kind, number of items and metrics, ready for JSON."""
        return {"kind": self.kind, "items": self.items, "metrics": dict(self.metrics)}

    def __str__(self) -> str:
        values = ", ".join(f"{metric} {value:.4f}" for metric, value in self.metrics.items())
        return f"{self.kind}: {values} ({self.items:,} items)"
