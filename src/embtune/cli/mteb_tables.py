"""What `embtune evaluate --mteb` shows: each model's scores, and each model against the first."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from embtune.evaluate.mteb_tasks import MtebScore

NOT_KNOWN = "not known: from what mteb gives, no score of single items follows, so nothing says how sure the change is"

Scores = Mapping[str, Sequence[MtebScore]]
"""Model -> its scores, of the same tasks in the same order; the first model is the baseline."""


Lengths = Mapping[str, int | None]
"""Model -> tokens up to which it reads a text; None reads it whole."""


def length_text(length: int | None) -> str:
    """A model's longest text, as tables say it."""
    return "no limit" if length is None else f"{length:,} tokens"


def mteb_as_dict(scores: Scores, lengths: Lengths) -> dict[str, Any]:
    """Scores and comparisons, ready for JSON; `metrics` is missing where mteb gives no scores of single items."""
    (baseline, before), *others = scores.items()
    comparisons = [
        {"before": baseline, "after": name, "task": old.task, "significance": "paired bootstrap", **found.to_dict()}
        if (found := old.compared_with(new))
        else {"before": baseline, "after": name, "task": old.task, "significance": NOT_KNOWN}
        for name, after in others
        for old, new in zip(before, after, strict=True)
    ]
    rows = [
        {"model": name, "max_seq_length": lengths[name], "scores": [score.to_dict() for score in found]}
        for name, found in scores.items()
    ]
    return {"mteb": rows, "comparisons": comparisons}


def show_mteb(scores: Scores, lengths: Lengths, console: Console) -> None:
    """Print the scores, and a table for each model after the first."""
    (baseline, before), *others = scores.items()
    table = _table("task", "main score", *scores)
    for place, score in enumerate(before):
        table.add_row(Text(score.task), score.metric, *(f"{found[place].score:.4f}" for found in scores.values()))
    table.add_row("texts up to", "", *(length_text(lengths[name]) for name in scores))
    console.print()
    console.print(table)
    for name, after in others:
        console.print(f"\n{baseline} (before) and {name} (after)", style="bold")
        console.print(_comparisons(before, after))
    if others and any(score.items is None for found in scores.values() for score in found):
        console.print(f"{NOT_KNOWN}.")


def _comparisons(before: Sequence[MtebScore], after: Sequence[MtebScore]) -> Table:
    table = _table("task", "items", "change", "95% interval", "p", "up", "down")
    table.add_column("")
    for old, new in zip(before, after, strict=True):
        found = old.compared_with(new)
        if found is None:
            table.add_row(Text(old.task), "", f"{new.score - old.score:+.4f}", "", "", "", "", "not known")
            continue
        [change] = found.metrics.values()
        table.add_row(
            Text(old.task),
            f"{change.items:,}",
            f"{change.difference:+.4f}",
            f"{change.low:+.4f} to {change.high:+.4f}",
            f"{change.p_value:.4f}",
            f"{found.wins:,}",
            f"{found.losses:,}",
            change.verdict,
        )
    return table


def _table(first: str, *headings: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, overflow="fold")
    for heading in headings:
        table.add_column(Text(heading, overflow="fold"), justify="right")
    return table
