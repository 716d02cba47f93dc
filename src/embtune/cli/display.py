"""What the commands show: on a terminal with colours and moving bars, elsewhere as plain lines for a log."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from embtune.cli.pacing import TimeBudget
from embtune.evaluate.retrieval import RetrievalResult
from embtune.report.events import EventLog

LOG_WIDTH = 120
SECONDS_BETWEEN_LINES = 10.0


def make_console() -> Console:
    """A console on standard output; text is shown as it is, brackets and all."""
    console = Console(markup=False, highlight=False)
    return console if console.is_terminal else Console(markup=False, highlight=False, width=LOG_WIDTH)


@contextmanager
def working(console: Console, what: str, log: EventLog | None = None) -> Iterator[None]:
    """Show that `what` is under way, and how long it took; `log` is told that it begins."""
    if log is not None:
        log.phase(what)
    start = time.perf_counter()
    if console.is_terminal:
        with console.status(Text(f"{what} ...")):
            yield
    else:
        console.print(f"{what} ...")
        yield
    console.print(f"{what}: {duration(time.perf_counter() - start)}", style="dim")


def duration(seconds: float) -> str:
    """Seconds as people say them: `8.2 s`, `4 min 05 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s"


class TrainingProgress(TrainerCallback):
    """A bar with loss, tokens per second and time left; a line every few seconds where there is no terminal.

    Args:
        console: where to show it.
        budget: knows the number of steps, which may change while training runs.
        tokens_per_step: mean number of real tokens (no padding) in a batch.
    """

    def __init__(self, console: Console, budget: TimeBudget, tokens_per_step: float) -> None:
        self.console = console
        self.budget = budget
        self.tokens_per_step = tokens_per_step
        self.losses: list[float] = []
        """Loss of each step so far."""
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._last_line = 0.0

    def __enter__(self) -> "TrainingProgress":
        self._progress.start()
        self._task = self._progress.add_task("training", total=None, numbers="")
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def on_log(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_kwargs: Any,
    ) -> None:
        """Called after each step, because the run logs each step."""
        if not logs or "loss" not in logs or self._task is None:
            return
        self.losses.append(float(logs["loss"]))
        seconds = self.budget.seconds_per_step
        numbers = f"loss {self.losses[-1]:.3f}  {self.tokens_per_step / seconds:,.0f} tokens/s"
        step, total = state.global_step, self.budget.total
        self._progress.update(self._task, completed=step, total=total, numbers=numbers)
        now = time.perf_counter()
        due = step == total or now - self._last_line >= SECONDS_BETWEEN_LINES
        if not self.console.is_terminal and due:
            self._last_line = now
            left = duration((total - step) * seconds)
            self.console.print(f"step {step}/{total}  {numbers}  {seconds:.2f} s a step  {left} left")


def sample_table(
    query_id: str,
    before: RetrievalResult,
    after: RetrievalResult,
    corpus: Mapping[str, str],
    right: set[str],
    n: int = 3,
) -> Table:
    """The best `n` documents for a query before and after, side by side; the right ones carry a star."""
    table = Table(title=Text(before.queries[query_id]), title_justify="left", box=None, pad_edge=False, expand=False)
    table.add_column("")
    for heading in ("before", "after"):
        table.add_column(heading, no_wrap=True, overflow="ellipsis", max_width=56)
    hits = zip(before.top(query_id, n), after.top(query_id, n), strict=True)
    for rank, (old, new) in enumerate(hits, start=1):
        table.add_row(str(rank), *(_hit(hit.document_id, corpus, right) for hit in (old, new)))
    return table


def _hit(document_id: str, corpus: Mapping[str, str], right: set[str]) -> Text:
    first_line = corpus[document_id].split("\n", maxsplit=1)[0]
    is_right = document_id in right
    return Text(f"{'*' if is_right else ' '} {document_id}  {first_line}", "bold green" if is_right else "")


def print_commands(console: Console, commands: Sequence[tuple[str, str]]) -> None:
    """Print (what for, command) pairs; commands stay on one line so that they can be copied."""
    for purpose, command in commands:
        console.print(f"\n{purpose}", style="bold")
        console.print(f"  {command}", soft_wrap=True)
