"""What the event file of a run says: read into one object, however far the run has come."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embtune.errors import ArgumentError
from embtune.report.alive import is_gone
from embtune.report.events import EVENTS, FORMAT, read_events

REPORT = "report.html"
"""Name of the page within a run's folder."""

SILENCE = 60.0  # seconds without an event while steps follow each other
LONG_SILENCE = 900.0  # seconds in phases that write nothing on their way: loading, measuring, saving
USUAL_GAPS = 5.0  # silence is judged by the longest pause so far, too


@dataclass(frozen=True)
class LogPoint:
    """One entry of the training log."""

    step: int
    """Optimizer steps taken."""
    loss: float
    """Mean since the entry before."""
    learning_rate: float | None
    """As the Trainer gives it."""
    tokens_per_second: float | None
    """Real tokens, since the entry before."""
    memory: float | None
    """Most bytes held at once until then."""


@dataclass
class Run:
    """A run as its events tell it."""

    name: str
    """Its folder's name."""
    state: str = "waiting"
    """`waiting` (no events yet), `running`, `stalled`, `killed`, `finished`, `interrupted` or `failed`."""
    command: str = "train"
    """The verb that wrote it."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Every option, resolved."""
    machine: dict[str, str] = field(default_factory=dict)
    """Device and versions."""
    process: dict[str, Any] = field(default_factory=dict)
    """What writes the events, as `alive.this_process` gives it; empty in files of older versions."""
    started: float | None = None
    """Seconds since 1970; of the last start, where the run was resumed."""
    training: tuple[float, int] | None = None
    """When the last start of training was, and after how many steps of earlier ones."""
    trained: float | None = None
    """When training ended."""
    last: float | None = None
    """When the last event was written."""
    phase: str = ""
    """What it was doing then."""
    error: str | None = None
    """Why it failed."""
    step: int = 0
    """Optimizer steps taken."""
    steps: int | None = None
    """Optimizer steps of the whole run."""
    log: list[LogPoint] = field(default_factory=list)
    """Losses; those that a resumed run took again are there once."""
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """Step and metrics of the evaluations while training."""
    checkpoints: list[int] = field(default_factory=list)
    """Steps at which a checkpoint was saved."""
    resumed: list[int] = field(default_factory=list)
    """Steps from which the run was gone on with."""
    memory: int | None = None
    """Most bytes held at once."""
    lengths: dict[str, Any] | None = None
    """As `lengths.measure_lengths` gives it."""
    step_time: dict[str, Any] | None = None
    """Seconds of each part of a step, and over how many steps."""
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    """As `evidence` describes them; the task first."""
    exports: list[dict[str, Any]] = field(default_factory=list)
    """Format, path, bytes and parity."""
    damaged: int = 0
    """Lines that could not be read."""
    _longest_gap: float = 0.0
    _training_alone: bool = False

    @property
    def running(self) -> bool:
        """Whether more may come."""
        return self.state in ("waiting", "running", "stalled")

    @property
    def seconds_left(self) -> float | None:
        """Time that the remaining steps of training will take at the pace so far; None where that is not known."""
        if self.training is None or self.trained or self.last is None or self.steps is None:
            return None
        taken = self.step - self.training[1]
        return (self.last - self.training[0]) / taken * (self.steps - self.step) if taken > 0 else None

    @property
    def seconds(self) -> float | None:
        """From the last start to the last event."""
        return None if self.started is None or self.last is None else self.last - self.started

    def take(self, event: dict[str, Any]) -> None:
        """Add what one event says.

        Raises:
            KeyError, TypeError, ValueError: it is not of the form that this version writes.
        """
        now = float(event["time"])
        getattr(self, f"_on_{event['event']}", _pass)(event)
        if self.last is not None and event["event"] != "run":
            self._longest_gap = max(self._longest_gap, now - self.last)
        self.last = now

    def judge(self, now: float) -> None:
        """Call a run killed whose process is gone, and one stalled that has said nothing for longer than it should."""
        if self.state != "running" or self.last is None:
            return
        if self.process and is_gone(self.process, self.last):
            self.state = "killed"
            return
        patience = SILENCE if self.phase == "Training" and self.step else LONG_SILENCE
        if now - self.last > max(patience, USUAL_GAPS * self._longest_gap):
            self.state = "stalled"

    def _on_run(self, event: dict[str, Any]) -> None:
        if int(event["format"]) > FORMAT:
            raise ArgumentError(f"{self.name} was written by a newer embtune; install that one to read it.")
        self.state, self.error, self.phase = "running", None, "Starting"
        self._training_alone = False
        self.command = str(event["command"])
        self.settings, self.machine = dict(event["settings"]), dict(event["machine"])
        process = event.get("process")
        self.process = {"place": str(process["place"]), "pid": int(process["pid"])} if process else {}
        self.started = float(event["time"])
        self.comparisons, self.exports = [], []

    def _on_phase(self, event: dict[str, Any]) -> None:
        self.phase = str(event["what"])

    def _on_training(self, event: dict[str, Any]) -> None:
        if self.state == "waiting":  # a program that has the callback alone, and says nothing of before and after
            self._training_alone, self.state, self.started = True, "running", float(event["time"])
        self.phase = "Training"
        self.training, self.trained = (float(event["time"]), int(event["step"])), None
        begun = self.training[1]
        if begun:
            self.resumed.append(begun)
        self.log = [point for point in self.log if point.step <= begun]
        self.evaluations = [(step, metrics) for step, metrics in self.evaluations if step <= begun]
        self.checkpoints = [step for step in self.checkpoints if step <= begun]
        self._on_step(event)

    def _on_step(self, event: dict[str, Any]) -> None:
        self.step = int(event["step"])
        self.steps = int(event["steps"])

    def _on_log(self, event: dict[str, Any]) -> None:
        self._on_step(event)
        self._note_memory(event)
        optional = (event.get(name) for name in ("learning_rate", "tokens_per_second", "memory"))
        rest = (None if value is None else float(value) for value in optional)
        self.log.append(LogPoint(self.step, float(event["loss"]), *rest))

    def _on_evaluation(self, event: dict[str, Any]) -> None:
        metrics = {str(name): float(value) for name, value in event["metrics"].items()}
        self.evaluations.append((int(event["step"]), metrics))
        self.phase = "Training"

    def _on_checkpoint(self, event: dict[str, Any]) -> None:
        self.checkpoints.append(int(event["step"]))

    def _on_trained(self, event: dict[str, Any]) -> None:
        self._on_step(event)
        self._note_memory(event)
        self.phase, self.trained = "Trained", float(event["time"])
        if self._training_alone:
            self.state = "finished"

    def _on_lengths(self, event: dict[str, Any]) -> None:
        self.lengths = event

    def _on_step_time(self, event: dict[str, Any]) -> None:
        self.step_time = {"seconds": {str(k): float(v) for k, v in event["seconds"].items()}, "steps": event["steps"]}

    def _on_comparison(self, event: dict[str, Any]) -> None:
        metrics = {
            str(metric): {name: value if name == "verdict" else float(value) for name, value in change.items()}
            for metric, change in event["metrics"].items()
        }
        self.comparisons.append(event | {"metrics": metrics, "role": str(event["role"])})
        self.comparisons.sort(key=lambda each: each["role"] != "task")

    def _on_export(self, event: dict[str, Any]) -> None:
        self.exports.append(event)

    def _on_finished(self, _event: dict[str, Any]) -> None:
        self.state = "finished"

    def _on_interrupted(self, _event: dict[str, Any]) -> None:
        self.state = "interrupted"

    def _on_failed(self, event: dict[str, Any]) -> None:
        self.state, self.error = "failed", str(event["error"])

    def _note_memory(self, event: dict[str, Any]) -> None:
        if event.get("memory") is not None:
            self.memory = int(event["memory"])


def _pass(_event: dict[str, Any]) -> None:
    """Events that only later versions know, and those that say no more than that the run is alive."""


def read_run(folder: str | Path, now: float | None = None) -> Run:
    """Read the run in a folder; without an event file it is `waiting`.

    Args:
        now: when silence is judged, in seconds since 1970; None is this moment.

    Raises:
        ArgumentError: a newer version wrote it, or it cannot be read.
    """
    path = Path(folder) / EVENTS
    run = Run(path.parent.resolve().name)
    try:
        events, run.damaged = read_events(path)
    except FileNotFoundError:
        return run
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read: {error}.") from error
    for event in events:
        try:
            run.take(event)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, ArgumentError):
                raise
            run.damaged += 1
    run.judge(time.time() if now is None else now)
    return run
