"""`embtune evaluate`: any number of models on one data set, in one table."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from embtune.api import FastSentenceTransformer
from embtune.cli.config import EvaluateConfig
from embtune.cli.display import make_console, working
from embtune.cli.tasks import EvaluationTask
from embtune.evaluate.compare import Comparison, compare
from embtune.evaluate.result import EvaluationResult
from embtune.models.load import Source
from embtune.runtime import describe_machine

REGRESSIONS_SHOWN = 5


def run_evaluate(config: EvaluateConfig, console: Console | None = None) -> int:
    """Measure every model, print the table (or JSON), and return the exit code.

    Raises:
        EmbtuneError: the data, a model or an argument cannot be used.
    """
    # With --json, standard output carries the object and nothing else.
    for name in config.models:
        Source(name=name)  # a path that leads nowhere is said now, not after the models before it were measured
    console = console or (Console(stderr=True, markup=False, highlight=False) if config.json else make_console())
    with working(console, f"Reading {config.data}"):
        task = EvaluationTask.read(
            config.data,
            config.columns,
            config.split,
            task=config.task,
            train_data=config.train_data,
            k=config.k,
            batch_size=config.batch_size,
        )
    console.print(f"Measuring on {task}.")
    if len(config.models) > 1:
        task.check_comparable()
    results = {name: _measure(name, task, config, console) for name in config.models}
    baseline, *others = config.models
    comparisons = {name: compare(results[baseline], results[name]) for name in others}
    if config.json:
        print(json.dumps(_to_dict(config, results, comparisons), indent=2, ensure_ascii=False))
    else:
        _show(results, comparisons, baseline, console)
    return 0


def _measure(name: str, task: EvaluationTask, config: EvaluateConfig, console: Console) -> EvaluationResult:
    with working(console, f"Measuring {name}"):
        model = FastSentenceTransformer.from_pretrained(
            name, max_seq_length=config.max_seq_length, dtype=config.dtype, for_inference=True
        )
        return task.run(model)


def _to_dict(
    config: EvaluateConfig, results: dict[str, EvaluationResult], comparisons: dict[str, Comparison]
) -> dict[str, Any]:
    return {
        "data": config.data,
        "results": [{"model": name, **result.to_dict()} for name, result in results.items()],
        "comparisons": [
            {"before": config.models[0], "after": name, **comparison.to_dict()}
            for name, comparison in comparisons.items()
        ],
        "machine": describe_machine(),
    }


def _show(
    results: dict[str, EvaluationResult], comparisons: dict[str, Comparison], baseline: str, console: Console
) -> None:
    first = results[baseline]
    table = Table(title=f"{first.kind}, {first.items:,} items", title_justify="left", box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    for metric in first.metrics:
        table.add_column(metric, justify="right", no_wrap=True)
    for name, result in results.items():
        table.add_row(Text(name), *(f"{value:.4f}" for value in result.metrics.values()))
    console.print()
    console.print(table)
    for name, comparison in comparisons.items():
        console.print(f"\n{baseline} (before) and {name} (after)", style="bold")
        console.print(comparison.render(regressions=REGRESSIONS_SHOWN))
