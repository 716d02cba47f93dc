"""Measuring before and after training: the tasks of a run, and prose, on which nothing should get worse."""

from typing import Any

from rich.console import Console
from sentence_transformers import SentenceTransformer

from embtune.cli.display import working
from embtune.cli.reading import RunData
from embtune.cli.tasks import EvaluationTask
from embtune.cli.train_config import TrainConfig
from embtune.evaluate.compare import Comparison, compare
from embtune.evaluate.result import EvaluationResult
from embtune.report.events import EventLog
from embtune.report.evidence import Evidence
from embtune.train.prompts import remember_prompts

PROSE = "prose"


class BeforeAndAfter:
    """Measures one model twice, compares, and notes what it sees.

    Args:
        data: what to measure on.
        log: gets the comparisons.
    """

    def __init__(self, data: RunData, console: Console, log: EventLog) -> None:
        self._console = console
        self._log = log
        self._tasks = dict(data.tasks)
        self._evidence = {name: Evidence(task.name, task.data) for name, task in data.tasks.items()}
        if data.tasks and data.prose is not None:
            self._tasks[PROSE] = EvaluationTask(PROSE, data.prose)
            self._evidence[PROSE] = Evidence(PROSE, data.prose, "forgetting")
        self._before: dict[str, EvaluationResult] = {}
        self._compared: dict[str, Comparison] = {}

    @property
    def by_data(self) -> dict[str, Comparison]:
        """Name of the evaluation data, prose among it -> what training changed; empty until both were measured."""
        return {self._tasks[name].name: comparison for name, comparison in self._compared.items()}

    def before(self, model: SentenceTransformer) -> None:
        """Measure the model as it is."""
        if not self._tasks:
            return
        with working(self._console, "Measuring the model as it is", self._log):
            for name, task in self._tasks.items():
                self._before[name] = task.run(model)
                self._evidence[name].see_before(model, self._before[name])

    def after(self, model: SentenceTransformer) -> None:
        """Measure the trained model, compare and show."""
        if not self._tasks:
            return
        with working(self._console, "Measuring the trained model", self._log):
            for name, task in self._tasks.items():
                after = task.run(model)
                self._compared[name] = compare(self._before[name], after)
                self._log.write("comparison", **self._evidence[name].compared(model, after, self._compared[name]))
        self._show()

    def results(self) -> dict[str, Any]:
        """For results.json."""
        written = {
            name: {"data": self._tasks[name].name, **comparison.to_dict()}
            for name, comparison in self._compared.items()
        }
        forgetting = written.pop(PROSE, None)
        found = {"evaluations": written, "forgetting": forgetting}
        return {name: value for name, value in found.items() if value}

    def _show(self) -> None:
        for name, comparison in self._compared.items():
            if name != PROSE:
                self._console.print(f"\n{self._tasks[name].name}", style="bold")
                self._console.print(comparison.render())
        if PROSE not in self._compared:
            return
        forgetting = self._compared[PROSE]
        self._console.print("\nFinding paragraphs of prose: the check against forgetting", style="bold")
        self._console.print(forgetting.render(regressions=0))
        if any(metric.verdict == "worse" for metric in forgetting.metrics.values()):
            advice = "Fewer steps, a smaller --learning-rate or general pairs among the data keep more of it."
            said = f"Prose got worse beyond chance: the model forgot something. {advice}"
            self._console.print(said, style="bold red")
        else:
            self._console.print("Passed: prose did not get worse beyond chance.", style="green")


def ready_prompts(config: TrainConfig, model: SentenceTransformer, data: RunData, console: Console) -> None:
    """Give the model its prompts before it is first measured, so that before and after differ by the training alone."""
    if not config.more.prompts or not data.tasks:
        return
    remember_prompts(model, config.more.prompts)
    used = {name: model.prompts[name] for name in ("query", "document") if model.prompts.get(name)}
    others = sorted({task.kind for task in data.tasks.values()} - {"retrieval"})
    if others:
        kinds = " and ".join(others)
        console.print(f"Measured without prompts, before and after: {kinds} has no queries and documents.")
    if used and any(task.kind == "retrieval" for task in data.tasks.values()):
        shown = ", ".join(f"{name} {prompt!r}" for name, prompt in used.items())
        console.print(f"Measured with these prompts, before and after: {shown}.")
