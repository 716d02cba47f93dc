"""`embtune evaluate`: any number of models on one data set or on tasks of MTEB, in one table."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text
from sentence_transformers import SentenceTransformer

from embtune.api import FastSentenceTransformer
from embtune.cli.config import EvaluateConfig
from embtune.cli.config_file import read_config
from embtune.cli.display import make_console, working
from embtune.cli.mteb_tables import mteb_as_dict, show_mteb
from embtune.cli.places import is_config
from embtune.cli.tasks import EvaluationTask
from embtune.errors import ArgumentError
from embtune.evaluate.compare import Comparison, compare
from embtune.evaluate.mteb_tasks import evaluate_mteb, mteb_tasks
from embtune.evaluate.result import EvaluationResult
from embtune.models.load import Source
from embtune.runtime import describe_machine

REGRESSIONS_SHOWN = 5

Measured = TypeVar("Measured")


def run_evaluate(config: EvaluateConfig, console: Console | None = None) -> int:
    """Measure every model, print the table (or JSON), and return the exit code.

    Raises:
        EmbtuneError: the data, a model or an argument cannot be used.
    """
    # With --json, standard output carries the object and nothing else.
    for name in config.models:
        Source(name=name)  # a path that leads nowhere is said now, not after the models before it were measured
    console = console or (Console(stderr=True, markup=False, highlight=False) if config.json else make_console())
    if config.mteb:
        _run_mteb(config, console)
    else:
        assert config.data is not None
        if is_config(config.data):
            config = _in_config(config, config.data)
        _run_data(config, str(config.data), console)
    return 0


def _in_config(config: EvaluateConfig, file: str) -> EvaluateConfig:
    """With the evaluation data, its columns and split that a config of `train` names.

    Raises:
        ArgumentError: it names none, or several.
    """
    train = read_config(file)
    if len(train.eval_data) != 1:
        names = ", ".join(train.eval_data) or "none"
        raise ArgumentError(f"{file} must name one data set as eval_data to measure on; it names {names}.")
    [(name, source)] = train.eval_data.items()
    columns, split = config.columns or train.eval_columns_of(name), config.split or train.more.eval_split
    return replace(config, data=source, columns=columns, split=split)


def _run_data(config: EvaluateConfig, data: str, console: Console) -> None:
    with working(console, f"Reading {data}"):
        task = EvaluationTask.read(
            data,
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
    results = {name: _measure(name, task.run, config, console) for name in config.models}
    baseline, *others = config.models
    comparisons = {name: compare(results[baseline], results[name]) for name in others}
    if config.json:
        print(json.dumps(_to_dict(config, results, comparisons), indent=2, ensure_ascii=False))
    else:
        _show(results, comparisons, baseline, console)


def _run_mteb(config: EvaluateConfig, console: Console) -> None:
    tasks = mteb_tasks(config.mteb)
    measure = partial(evaluate_mteb, tasks=tasks, batch_size=config.batch_size)
    scores = {name: _measure(name, measure, config, console) for name in config.models}
    if config.json:
        found = {**mteb_as_dict(scores), "machine": describe_machine()}
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        show_mteb(scores, console)


def _measure(
    name: str, measure: Callable[[SentenceTransformer], Measured], config: EvaluateConfig, console: Console
) -> Measured:
    with working(console, f"Measuring {name}"):
        model = FastSentenceTransformer.from_pretrained(
            name, max_seq_length=config.max_seq_length, dtype=config.dtype, for_inference=True
        )
        return measure(model)


def _to_dict(
    config: EvaluateConfig, results: dict[str, EvaluationResult], comparisons: dict[str, Comparison]
) -> dict[str, Any]:
    return {
        "data": config.data,
        "results": [
            {"model": name, **result.to_dict(), "intervals": result.intervals()} for name, result in results.items()
        ],
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
    main, *others = first.metrics
    for heading in (main, "95% interval", *others):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, result in results.items():
        interval = " to ".join(f"{end:.4f}" for end in result.intervals().get(main, ()))
        values = [f"{value:.4f}" for value in result.metrics.values()]
        table.add_row(Text(name), values[0], interval, *values[1:])
    console.print()
    console.print(table)
    for name, comparison in comparisons.items():
        console.print(f"\n{baseline} (before) and {name} (after)", style="bold")
        console.print(comparison.render(regressions=REGRESSIONS_SHOWN))
