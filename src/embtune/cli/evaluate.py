"""`embtune evaluate`: any number of models on one data set or on tasks of MTEB, in one table."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text
from sentence_transformers import SentenceTransformer

from embtune.api import FastSentenceTransformer
from embtune.cli.config import EvaluateConfig
from embtune.cli.config_file import read_config
from embtune.cli.display import make_console, working
from embtune.cli.mteb_tables import length_text, mteb_as_dict, show_mteb
from embtune.cli.places import is_config
from embtune.cli.tasks import EvaluationTask
from embtune.errors import ArgumentError
from embtune.evaluate.compare import Comparison, compare
from embtune.evaluate.mteb_tasks import evaluate_mteb, mteb_tasks
from embtune.evaluate.result import EvaluationResult
from embtune.models.source import Source, check_there
from embtune.runtime import describe_machine

REGRESSIONS_SHOWN = 5

Found = TypeVar("Found")


@dataclass(frozen=True)
class Measured(Generic[Found]):
    """What one model scores, and where it cuts texts."""

    result: Found
    """Its scores."""
    max_seq_length: int | None
    """In tokens; None where it reads texts whole."""


def run_evaluate(config: EvaluateConfig, console: Console | None = None) -> int:
    """Measure every model, print the table (or JSON), and return the exit code.

    Raises:
        EmbtuneError: the data, a model or an argument cannot be used.
    """
    # With --json, standard output carries the object and nothing else.
    for name in config.models:
        check_there(Source(name=name))  # said now, not after the models before it were measured
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
    """With the evaluation data that a config of `train` names, and how that run measures on it; flags win.

    Raises:
        ArgumentError: it names none, or several.
    """
    train = read_config(file)
    if len(train.eval_data) != 1:
        names = ", ".join(train.eval_data) or "none"
        raise ArgumentError(f"{file} must name one data set as eval_data to measure on; it names {names}.")
    [(name, source)] = train.eval_data.items()
    more = train.more
    task: Any = more.eval_tasks.get(name, "auto") if config.task == "auto" else config.task  # checked as one of TASKS
    return replace(
        config,
        data=source,
        columns=config.columns or train.eval_columns_of(name),
        split=config.split or more.eval_split,
        task=task,
        train_data=config.train_data or more.eval_train_data.get(name),
        k=config.k or more.eval_k,
        max_seq_length=config.max_seq_length or train.max_seq_length,
    )


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
    measured = {name: _measure(name, task.run, config, console) for name in config.models}
    _say_lengths_differ(measured, console)
    results = {name: each.result for name, each in measured.items()}
    baseline, *others = config.models
    comparisons = {name: compare(results[baseline], results[name]) for name in others}
    if config.json:
        print(json.dumps(_to_dict(config, measured, comparisons), indent=2, ensure_ascii=False))
    else:
        _show(measured, comparisons, baseline, console)


def _run_mteb(config: EvaluateConfig, console: Console) -> None:
    tasks = mteb_tasks(config.mteb)
    measure = partial(evaluate_mteb, tasks=tasks, batch_size=config.batch_size)
    measured = {name: _measure(name, measure, config, console) for name in config.models}
    _say_lengths_differ(measured, console)
    scores = {name: each.result for name, each in measured.items()}
    lengths = {name: each.max_seq_length for name, each in measured.items()}
    if config.json:
        found = {**mteb_as_dict(scores, lengths), "machine": describe_machine()}
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        show_mteb(scores, lengths, console)


def _measure(
    name: str, measure: Callable[[SentenceTransformer], Found], config: EvaluateConfig, console: Console
) -> Measured[Found]:
    with working(console, f"Measuring {name}"):
        model = FastSentenceTransformer.from_pretrained(
            name, max_seq_length=config.max_seq_length, dtype=config.dtype, for_inference=True
        )
        return Measured(measure(model), model.max_seq_length)


def _say_lengths_differ(measured: Mapping[str, Measured[Any]], console: Console) -> None:
    """A model that reads more of each text may score better for that alone."""
    lengths = {name: each.max_seq_length for name, each in measured.items()}
    if len(set(lengths.values())) < 2:
        return
    each = ", ".join(f"{name} to {length_text(length)}" for name, length in lengths.items())
    least = min(length for length in lengths.values() if length is not None)
    console.print(
        f"The models cut texts at different lengths: {each}. --max-seq-length {least} measures all at the same.",
        style="yellow",
        soft_wrap=True,
    )


def _to_dict(
    config: EvaluateConfig, measured: Mapping[str, Measured[EvaluationResult]], comparisons: Mapping[str, Comparison]
) -> dict[str, Any]:
    return {
        "data": config.data,
        "results": [
            {
                "model": name,
                "max_seq_length": each.max_seq_length,
                **each.result.to_dict(),
                "intervals": each.result.intervals(),
            }
            for name, each in measured.items()
        ],
        "comparisons": [
            {"before": config.models[0], "after": name, **comparison.to_dict()}
            for name, comparison in comparisons.items()
        ],
        "machine": describe_machine(),
    }


def _show(
    measured: Mapping[str, Measured[EvaluationResult]],
    comparisons: Mapping[str, Comparison],
    baseline: str,
    console: Console,
) -> None:
    first = measured[baseline].result
    table = Table(title=f"{first.kind}, {first.items:,} items", title_justify="left", box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    main, *others = first.metrics
    for heading in (main, "95% interval", *others, "up to"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, each in measured.items():
        interval = " to ".join(f"{end:.4f}" for end in each.result.intervals().get(main, ()))
        score, *rest = (f"{value:.4f}" for value in each.result.metrics.values())
        table.add_row(Text(name), score, interval, *rest, length_text(each.max_seq_length))
    console.print()
    console.print(table)
    for name, comparison in comparisons.items():
        console.print(f"\n{baseline} (before) and {name} (after)", style="bold")
        console.print(comparison.render(regressions=REGRESSIONS_SHOWN))
