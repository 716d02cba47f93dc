"""Before and after: what changed, how sure that is, and which items got worse."""

from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from embtune.errors import ArgumentError, DataError
from embtune.evaluate.bootstrap import Difference, Statistic, bootstrap
from embtune.evaluate.result import EvaluationResult, ItemScores

FEW_ITEMS = 30
TIE = 1e-9  # rounding differs between two runs of the same model by far less


@dataclass(frozen=True)
class ItemChange:
    """A query, pair or text whose own score changed."""

    item: str
    """Its id, or its index in the lists that were evaluated."""
    text: str
    """Its text."""
    before: float
    """Its score with the first model."""
    after: float
    """Its score with the second model."""

    @property
    def difference(self) -> float:
        """`after - before`."""
        return self.after - self.before


@dataclass(frozen=True)
class Comparison:
    """Two results of the same data. `print(comparison)` gives plain text, `rich.print(comparison)` a table."""

    kind: str
    """What was evaluated."""
    metrics: dict[str, Difference]
    """Metric -> before, after, difference, interval and p-value; the main metric first."""
    item_metric: str | None
    """The score of a single item that wins and losses go by, or None where items have none (clustering)."""
    ties: int
    """Items whose score did not change."""
    regressions: tuple[ItemChange, ...]
    """Items that got worse, the worst first."""
    improvements: tuple[ItemChange, ...]
    """Items that got better, the best first."""

    @property
    def wins(self) -> int:
        """Items that got better."""
        return len(self.improvements)

    @property
    def losses(self) -> int:
        """Items that got worse."""
        return len(self.regressions)

    @property
    def significant(self) -> bool:
        """Whether the main metric changed beyond chance, for better or worse."""
        return next(iter(self.metrics.values())).significant

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        metrics = {metric: difference.to_dict() for metric, difference in self.metrics.items()}
        if self.item_metric is None:
            return {"kind": self.kind, "metrics": metrics}
        return {
            "kind": self.kind,
            "metrics": metrics,
            "item_metric": self.item_metric,
            "wins": self.wins,
            "losses": self.losses,
            "ties": self.ties,
            "regressions": [_change_dict(change) for change in self.regressions],
            "improvements": [_change_dict(change) for change in self.improvements],
        }

    def render(self, regressions: int = 5) -> Group:
        """The table, wins and losses, and the first `regressions` items that got worse, for a rich console."""
        main = next(iter(self.metrics.values()))
        parts: list[Table | Text] = [self._table(main)]
        if main.items < FEW_ITEMS:
            parts.append(Text(f"Only {main.items} items: intervals from so few are too narrow."))
        if self.item_metric is not None:
            parts.append(Text(f"{self.item_metric}: {self.wins:,} up, {self.losses:,} down, {self.ties:,} unchanged"))
        if self.regressions and regressions > 0:
            parts.append(Text("Down the most:"))
            parts.extend(_change_line(change) for change in self.regressions[:regressions])
        return Group(*parts)

    def _table(self, main: Difference) -> Table:
        # No box: the same table must be readable in a log file.
        table = Table(title=f"{self.kind}, {main.items:,} items", title_justify="left", box=None, pad_edge=False)
        table.add_column("")
        for heading in ("before", "after", "change", f"{main.confidence:.0%} interval", "p"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("")
        for metric, change in self.metrics.items():
            style = {"better": "green", "worse": "red"}.get(change.verdict, "")
            table.add_row(
                metric,
                f"{change.before:.4f}",
                f"{change.after:.4f}",
                Text(f"{change.difference:+.4f}", style),
                f"{change.low:+.4f} to {change.high:+.4f}",
                f"{change.p_value:.4f}",
                Text(change.verdict, style),
            )
        return table

    def __rich__(self) -> Group:
        return self.render()

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=120, color_system=None).print(self.render())
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def compare(
    before: EvaluationResult,
    after: EvaluationResult,
    *,
    samples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare two results of the same evaluation on the same data by paired bootstrap.

    Raises:
        ArgumentError: the results are of different kinds or have different metrics; `samples` or `confidence` is out
            of range.
        DataError: the results are of different data, or of fewer than two items.
    """
    if before.kind != after.kind:
        raise ArgumentError(
            f"before is a {before.kind} result and after is a {after.kind} result; compare like with like."
        )
    if before.metrics.keys() != after.metrics.keys():
        raise ArgumentError(
            f"before has {', '.join(before.metrics)} and after has {', '.join(after.metrics)}; evaluate both with the "
            "same k."
        )
    if before.fingerprint != after.fingerprint:
        raise DataError(
            f"before ({before.items:,} items) and after ({after.items:,} items) were measured on different data, or on "
            "the same items in another order; evaluate both models with the same data."
        )
    values = {metric: (before.metrics[metric], after.metrics[metric]) for metric in before.metrics}
    statistics = before.statistics(), after.statistics()
    changes = {metric: _change(statistics[0][metric], statistics[1][metric]) for metric in before.metrics}
    metrics = bootstrap(values, changes, before.items, samples=samples, confidence=confidence, seed=seed)
    items_before, items_after = before.by_item(), after.by_item()
    if items_before is None or items_after is None:
        return Comparison(before.kind, metrics, None, 0, (), ())
    items = _item_changes(items_before, items_after)
    regressions = tuple(change for change in items if change.difference < 0)
    improvements = tuple(change for change in reversed(items) if change.difference > 0)
    ties = before.items - len(items)
    return Comparison(before.kind, metrics, items_before.metric, ties, regressions, improvements)


def _change(before: Statistic, after: Statistic) -> Statistic:
    return lambda counts_SN: after(counts_SN) - before(counts_SN)


def _item_changes(before: ItemScores, after: ItemScores) -> list[ItemChange]:
    """The items whose score changed, the worst loss first."""
    differences = after.scores - before.scores
    return [
        ItemChange(before.names[item], before.texts[item], float(before.scores[item]), float(after.scores[item]))
        for item in np.argsort(differences, kind="stable").tolist()
        if abs(differences[item]) > TIE
    ]


def _change_dict(change: ItemChange) -> dict[str, Any]:
    return {"item": change.item, "text": change.text, "before": change.before, "after": change.after}


def _change_line(change: ItemChange) -> Text:
    text = " ".join(change.text.split())
    short = text if len(text) <= 80 else text[:79] + "…"
    return Text(f"  {change.before:.3f} -> {change.after:.3f}  {change.item}: {short}")
