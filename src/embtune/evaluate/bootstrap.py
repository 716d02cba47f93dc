"""Paired bootstrap: is the difference between two models larger than the luck of which items were in the test set?

Items (queries, sentence pairs, texts) are drawn with replacement, the same draw for both models, and the difference of
the metric is computed again on each draw. The interval is the percentile interval (Efron and Tibshirani, "An
Introduction to the Bootstrap", 1993, chapter 13); the p-value is that interval turned round: twice the smaller share
of draws on either side of zero. For its use in retrieval see Sakai, "Evaluating Evaluation Metrics Based on the
Bootstrap", SIGIR 2006, and Smucker, Allan and Carterette, "A Comparison of Statistical Significance Tests for
Information Retrieval Evaluation", CIKM 2007.

Shapes: S draws, N items. A draw is a row of counts, how often each item was drawn; a row of ones is the data.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from embtune.errors import ArgumentError, DataError

Statistic = Callable[[np.ndarray], np.ndarray]
"""A metric as a function of draws: counts_SN (int64) -> values_S (float64)."""

COUNTS_PER_BLOCK = 2**21  # keeps a block of draws, and the few temporaries of its size, to tens of megabytes


@dataclass(frozen=True)
class Difference:
    """A metric before and after, and how sure its change is; higher is better."""

    before: float
    """The metric of the first model."""
    after: float
    """The metric of the second model."""
    difference: float
    """`after - before`."""
    low: float
    """Lower end of the interval for `difference`."""
    high: float
    """Upper end of the interval for `difference`."""
    p_value: float
    """Two-sided; never below 2 / (samples + 1)."""
    confidence: float
    """Coverage of the interval, such as 0.95."""
    items: int
    """Number of items that were drawn from."""
    samples: int
    """Number of draws."""

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0.

        Never with so few items that even a change in the same direction on all of them, 2^(1 - items) likely by
        chance, would not reach `confidence`: the bootstrap's interval is far too narrow there.
        """
        return (self.low > 0 or self.high < 0) and 2.0 ** (1 - self.items) <= 1 - self.confidence

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `no clear change`."""
        if not self.significant:
            return "no clear change"
        return "better" if self.difference > 0 else "worse"

    def to_dict(self) -> dict[str, Any]:
        """All fields, `significant` and `verdict`, ready for JSON."""
        return {**asdict(self), "significant": self.significant, "verdict": self.verdict}


def paired_bootstrap(
    before: Sequence[float] | np.ndarray,
    after: Sequence[float] | np.ndarray,
    *,
    samples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Bootstrap the difference of means of two score lists over the same items, such as nDCG per query.

    Raises:
        DataError: the lists differ in length, hold fewer than two items, or hold anything but finite numbers.
        ArgumentError: `samples` or `confidence` is out of range.
    """
    before_N, after_N = _scores("before", before), _scores("after", after)
    if len(before_N) != len(after_N):
        raise DataError(
            f"before has {len(before_N)} items and after has {len(after_N)}: a paired comparison needs a score of "
            "both models for each item, in the same order."
        )
    means = {"mean": (float(before_N.mean()), float(after_N.mean()))}
    change = {"mean": mean_statistic(after_N - before_N)}
    return bootstrap(means, change, len(before_N), samples=samples, confidence=confidence, seed=seed)["mean"]


def bootstrap(
    values: Mapping[str, tuple[float, float]],
    changes: Mapping[str, Statistic],
    items: int,
    *,
    samples: int,
    confidence: float,
    seed: int,
) -> dict[str, Difference]:
    """Bootstrap several metrics on the same draws.

    Args:
        values: metric -> (before, after) on the data itself.
        changes: metric -> `after - before` as a function of draws.
        items: N.

    Raises:
        DataError: fewer than two items.
        ArgumentError: `samples` or `confidence` is out of range.
    """
    if items < 2:
        raise DataError(f"A comparison needs at least two items; there is {items}, so nothing says how sure it is.")
    if samples < 100:
        raise ArgumentError(f"samples={samples} is too few for an interval; use at least 100 (10,000 is usual).")
    if not 0 < confidence < 1:
        raise ArgumentError(f"confidence={confidence} must lie between 0 and 1, such as 0.95.")
    drawn: dict[str, list[np.ndarray]] = {metric: [] for metric in changes}
    for counts_SN in draws(items, samples, seed):
        for metric, change in changes.items():
            drawn[metric].append(change(counts_SN))
    return {
        metric: _difference(*values[metric], np.concatenate(blocks), items, confidence)
        for metric, blocks in drawn.items()
    }


def intervals(
    statistics: Mapping[str, Statistic], items: int, *, samples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """The percentile interval of each metric of one model; two items at least are needed for any.

    Whether one model is better than another is told by the interval of their *difference* (`bootstrap`), which is
    narrower: both have the same items.
    """
    if items < 2:
        return {}
    drawn: dict[str, list[np.ndarray]] = {metric: [] for metric in statistics}
    for counts_SN in draws(items, samples, seed):
        for metric, statistic in statistics.items():
            drawn[metric].append(statistic(counts_SN))
    return {metric: _ends(np.concatenate(blocks), confidence) for metric, blocks in drawn.items()}


def draws(items: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield `samples` draws of `items` items with replacement, as blocks counts_SN."""
    generator = np.random.default_rng(seed)
    rows = max(1, COUNTS_PER_BLOCK // items)
    for start in range(0, samples, rows):
        block = min(rows, samples - start)
        cells = generator.integers(items, size=(block, items)) + np.arange(block)[:, None] * items
        yield np.bincount(cells.ravel(), minlength=block * items).reshape(block, items)


def mean_statistic(scores_N: np.ndarray) -> Statistic:
    """The mean of per-item scores as a function of draws."""
    return lambda counts_SN: counts_SN @ scores_N / len(scores_N)


def _ends(drawn_S: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(drawn_S, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _difference(before: float, after: float, drawn_S: np.ndarray, items: int, confidence: float) -> Difference:
    low, high = _ends(drawn_S, confidence)
    samples = len(drawn_S)
    # One is added on both sides of the fraction: a p-value of exactly 0 would claim more than `samples` draws can show.
    smaller = min(np.count_nonzero(drawn_S <= 0), np.count_nonzero(drawn_S >= 0))
    p_value = min(1.0, 2 * (smaller + 1) / (samples + 1))
    return Difference(before, after, after - before, low, high, p_value, confidence, items, samples)


def _scores(name: str, scores: Sequence[float] | np.ndarray) -> np.ndarray:
    scores_N = np.asarray(scores)
    if scores_N.ndim != 1 or not scores_N.size or scores_N.dtype.kind not in "biuf":
        raise DataError(f"{name} must be a flat list of numbers, one per item.")
    if not np.isfinite(scores_N).all():
        raise DataError(f"{name}[{int(np.argmin(np.isfinite(scores_N)))}] is not a finite number.")
    return scores_N.astype(np.float64)
