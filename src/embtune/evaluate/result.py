"""What the results of all evaluations have in common, so that any two of a kind can be compared."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from embtune.evaluate.bootstrap import Statistic, intervals


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

    @property
    def item_metric(self) -> str | None:
        """Name of what `item_scores` holds, or None where a single item has no score of its own."""
        return None

    def item_scores(self) -> np.ndarray:
        """One score per item (N,), in the order of the data."""
        raise NotImplementedError(f"{self.kind} has no score per item")

    def item_names(self) -> list[str]:
        """How reports call the items: by id, or by index in the lists that were given."""
        return [str(item) for item in range(self.items)]

    def item_texts(self) -> list[str]:
        """The items' texts, for people."""
        raise NotImplementedError(f"{self.kind} has no score per item")

    def intervals(self, **settings: Any) -> dict[str, tuple[float, float]]:
        """Metric -> bootstrap interval over the items; `settings` are those of `bootstrap.intervals`."""
        return intervals(self.statistics(), self.items, **settings)

    def to_dict(self) -> dict[str, Any]:
        """Kind, number of items and metrics, ready for JSON."""
        return {"kind": self.kind, "items": self.items, "metrics": dict(self.metrics)}

    def __str__(self) -> str:
        values = ", ".join(f"{metric} {value:.4f}" for metric, value in self.metrics.items())
        return f"{self.kind}: {values} ({self.items:,} items)"
