"""What a run is about to do, before it does it: data as understood, lengths, memory, time, what is on and why."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from embtune.cli.display import duration, size
from embtune.cli.reading import RunData, SourceFacts
from embtune.report.explain import Explanation
from embtune.train.estimate import RunEstimate


@dataclass(frozen=True)
class Preflight:
    """Everything that is known of a run before its first step."""

    data: RunData
    """What it reads."""
    lengths: Mapping[str, Any] | None
    """As `measure_lengths` gives them; None for a model that reads no tokens."""
    real_tokens: float
    """Tokens of an optimizer step, padding left out."""
    explanation: Explanation
    """What is on, what is off, and why."""
    estimate: RunEstimate
    """Time and memory."""
    compiling: str | None = None
    """Whether the run would compile, and why; a run that begins says so itself."""

    def to_dict(self) -> dict[str, Any]:
        """The fields of a `preflight` event."""
        return {
            "data": {name: asdict(facts) for name, facts in self.data.facts.items()},
            "findings": self.data.findings,
            "lengths": self.lengths,
            "settings": [list(row) for row in self.explanation.rows],
            "estimate": self.estimate.to_dict(),
            "compiling": self.compiling,
        }

    def show(self, console: Console) -> None:
        """Print it."""
        for facts in self.data.facts.values():
            console.print(_described(facts), style="bold")
            console.print(_columns(facts))
        console.print()
        for what, said in self._rows():
            console.print(f"{what:<11}{said}", soft_wrap=True)
        console.print(f"\n{self.explanation}", style="dim")
        console.print(f"compile: {self.compiling}\n" if self.compiling else "", style="dim")

    def _rows(self) -> list[tuple[str, str]]:
        found = len(self.data.findings)
        looked_for = "duplicate rows, pairs that teach nothing, evaluation texts among training texts"
        checked = f"{found} found, in the warnings above" if found else "none found"
        return [("checked", f"{looked_for}: {checked}"), *self._about_lengths(), *self._about_cost()]

    def _about_lengths(self) -> list[tuple[str, str]]:
        if self.lengths is None:
            return []
        columns = self.lengths["columns"].items()
        each = "; ".join(f"{name} {facts['mean']:.0f} (longest {facts['longest']})" for name, facts in columns)
        limit, cut = self.lengths["max_seq_length"], self.lengths["truncated"]
        truncated = f"{cut:.1%} of the texts reach the limit of {limit} and may be cut" if limit else "no limit"
        padding = f"{self.lengths['padding']:.0%} of a padded batch would be padding"
        answer = "packed rows leave it out" if self.lengths["packed"] else "and is computed here"
        return [("tokens", f"{each}; {truncated}"), ("padding", f"{padding}; {answer}")]

    def _about_cost(self) -> list[tuple[str, str]]:
        cost = self.estimate
        if cost.measured:
            basis = "measured in steps on random rows, here and now; without compiling, evaluation and exports"
            rough, remedy = "", ""
        else:
            basis = "from the sizes of model and batch, not measured; may be off by half, on a GPU by a factor of three"
            rough, remedy = "about ", " (--dry-run measures it; the display corrects it after the first steps)"
        time = "not known for this device"
        if cost.seconds is not None and cost.step_seconds is not None:
            time = f"{rough}{duration(cost.seconds)} for {cost.steps:,} steps of {cost.step_seconds:.2g} s"
        return [("memory", f"{rough}{size(cost.memory)}"), ("time", time), ("", f"{basis}{remedy}")]


def _described(facts: SourceFacts) -> str:
    separator = f", cells separated by {facts.separator}" if facts.separator else ""
    return f"\n{facts.source}: {facts.rows:,} rows{separator}"


def _columns(facts: SourceFacts) -> Table:
    table = Table(box=None, pad_edge=False)
    samples = max(len(column.cells) for column in facts.columns)
    for heading in ("column", "used as", *(f"row {number}" for number in range(1, samples + 1))):
        table.add_column(heading, overflow="fold")
    for column in facts.columns:
        role = Text(column.role) if column.role else Text("not used", "dim")
        table.add_row(Text(column.name), role, *(Text(cell) for cell in column.cells))
    return table
