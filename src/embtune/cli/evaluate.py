"""`embtune evaluate`: any number of models on one data set, in one table; `EvaluationTask` serves training too."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sentence_transformers import SentenceTransformer

from embtune.api import FastSentenceTransformer
from embtune.cli.config import EvaluateConfig
from embtune.cli.display import make_console, working
from embtune.data.columns import LABEL_ROLES
from embtune.data.readers import read_dataset
from embtune.data.retrieval import RetrievalData
from embtune.errors import ArgumentError, DataError
from embtune.evaluate.compare import Comparison, compare
from embtune.evaluate.result import EvaluationResult
from embtune.evaluate.retrieval import evaluate_retrieval
from embtune.evaluate.sts import evaluate_sts
from embtune.runtime import describe_machine

REGRESSIONS_SHOWN = 5


@dataclass(frozen=True)
class EvaluationTask:
    """Data to measure a model on: retrieval, or similarity of scored sentences."""

    name: str
    """Its file or folder without the way there, or its Hub name."""
    data: RetrievalData | Dataset
    """Queries and documents, or rows of sentence1, sentence2 and a score."""
    k: int = 10
    """Depth of the retrieval metrics."""
    batch_size: int = 64
    """Texts encoded at a time."""

    @classmethod
    def read(
        cls,
        source: str,
        columns: Mapping[str, str],
        split: str | None = None,
        *,
        k: int | None = None,
        batch_size: int = 64,
    ) -> "EvaluationTask":
        """Read a BEIR folder, or rows that are pairs or scored sentences, from a file or the Hub.

        Raises:
            ArgumentError, DataError: see the message, which names file, line and column.
        """
        path = Path(source).expanduser()
        if path.is_dir():
            if columns:
                raise ArgumentError(f"columns={dict(columns)}: {source} is a BEIR folder, whose keys are fixed.")
            return cls(path.resolve().name, RetrievalData.from_beir(path, split or "test"), k or cls.k, batch_size)
        rows = read_dataset(source, columns=columns or None, split=split or "train")
        name = path.name if path.exists() else source
        if "anchor" in rows.column_names:
            return cls(name, RetrievalData.from_pairs(rows), k or cls.k, batch_size)
        if "sentence1" in rows.column_names and _label(rows):
            if k is not None:
                raise ArgumentError(f"k={k} is the depth of retrieval, but {source} holds scored sentences.")
            return cls(name, rows, batch_size=batch_size)
        raise DataError(
            f"{source} has the columns {', '.join(rows.column_names)}, with which nothing can be measured. Give pairs "
            "(anchor, positive), scored sentences (sentence1, sentence2, score), or a BEIR folder."
        )

    @property
    def main_metric(self) -> str:
        """The metric by which the best checkpoint is known."""
        return f"ndcg@{self.k}" if isinstance(self.data, RetrievalData) else "spearman"

    def run(self, model: SentenceTransformer) -> EvaluationResult:
        """Measure `model`."""
        if isinstance(self.data, RetrievalData):
            return evaluate_retrieval(model, self.data, k=self.k, batch_size=self.batch_size)
        columns = self.data["sentence1"], self.data["sentence2"], self.data[_label(self.data)]
        return evaluate_sts(model, *map(list, columns), batch_size=self.batch_size)

    def __str__(self) -> str:
        if isinstance(self.data, RetrievalData):
            return f"{len(self.data.queries):,} queries and {len(self.data.corpus):,} documents from {self.name}"
        return f"{len(self.data):,} scored pairs of sentences from {self.name}"


def _label(rows: Dataset) -> str | None:
    return next((name for name in rows.column_names if name in LABEL_ROLES), None)


def run_evaluate(config: EvaluateConfig, console: Console | None = None) -> int:
    """Measure every model, print the table (or JSON), and return the exit code.

    Raises:
        EmbtuneError: the data, a model or an argument cannot be used.
    """
    # With --json, standard output carries the object and nothing else.
    console = console or (Console(stderr=True, markup=False, highlight=False) if config.json else make_console())
    with working(console, f"Reading {config.data}"):
        task = EvaluationTask.read(config.data, config.columns, config.split, k=config.k, batch_size=config.batch_size)
    console.print(f"Measuring on {task}.")
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
