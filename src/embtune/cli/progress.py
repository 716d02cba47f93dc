"""The live display of a training run: a bar and the run's numbers, or a line every few seconds without a terminal."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from embtune.cli.display import duration, size
from embtune.cli.pacing import TimeBudget
from embtune.runtime import peak_memory

SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress(TrainerCallback):
    """Shows steps, loss, learning rate, tokens per second, memory, the evaluation so far and the time left.

    Args:
        console: where to show it.
        budget: knows the number of steps, which may change while training runs.
        tokens_per_step: mean number of real tokens (no padding) in a batch.
        metric: the key of an evaluation's metrics that is shown; None shows none.
    """

    def __init__(self, console: Console, budget: TimeBudget, tokens_per_step: float, metric: str | None = None) -> None:
        self.console = console
        self.budget = budget
        self.tokens_per_step = tokens_per_step
        self.metric = metric
        self.losses: list[float] = []
        """The losses that were logged."""
        self._live = not console.quiet and console.is_terminal
        self._bar = Progress(
            *(TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}")),
            console=console,
        )
        self._task = self._bar.add_task("training", total=None, left="")
        self._display = Live(self, console=console, refresh_per_second=4)
        self._numbers: dict[str, str] = {}
        self._step = 0
        self._last_line = 0.0

    def __enter__(self) -> "TrainingProgress":
        if self._live:
            self._display.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._display.stop()

    def __rich__(self) -> Group:
        return Group(self._bar, Text(f"  {self._described()}"))

    def on_step_end(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Move the bar; reads nothing from the accelerator."""
        self._step = state.global_step
        self._numbers["speed"] = f"{self.tokens_per_step / self.budget.seconds_per_step:,.0f} tokens/s"
        left = f"{duration(self._seconds_left())} left"
        self._bar.update(self._task, completed=self._step, total=self.budget.total, left=left)

    def on_log(
        self,
        args: TrainingArguments,
        _state: TrainerState,
        _control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_kwargs: Any,
    ) -> None:
        """Take what the Trainer has just read from the accelerator."""
        if not logs or "loss" not in logs:
            return
        self.losses.append(float(logs["loss"]))
        self._numbers["loss"] = f"loss {self.losses[-1]:.3f}"
        if "learning_rate" in logs:
            self._numbers["rate"] = f"learning rate {logs['learning_rate']:.1e}"
        memory = peak_memory(args.device)
        if memory is not None:
            self._numbers["memory"] = size(memory)
        now = time.perf_counter()
        due = self._step == self.budget.total or now - self._last_line >= SECONDS_BETWEEN_LINES
        if not self._live and due:
            self._last_line = now
            seconds, left = self.budget.seconds_per_step, duration(self._seconds_left())
            place = f"step {self._step}/{self.budget.total}"
            self.console.print(f"{place}  {self._described()}  {seconds:.2f} s a step  {left} left", soft_wrap=True)

    def on_evaluate(
        self,
        _args: TrainingArguments,
        _state: TrainerState,
        _control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_kwargs: Any,
    ) -> None:
        """Keep the latest value of the metric that is shown."""
        if metrics and self.metric in metrics:
            name = str(self.metric).removeprefix("eval_")
            self._numbers["evaluation"] = f"{name} {metrics[str(self.metric)]:.4f} at step {self._step}"

    def _seconds_left(self) -> float:
        return max(0, self.budget.total - self._step) * self.budget.seconds_per_step

    def _described(self) -> str:
        order = ("loss", "rate", "speed", "memory", "evaluation")
        return "  ".join(self._numbers[name] for name in order if name in self._numbers)
