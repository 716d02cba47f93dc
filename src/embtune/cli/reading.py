"""The data of a training run: read, checked and described before anything heavy is imported."""

import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from datasets import Dataset
from rich.console import Console

from embtune.cli.display import working
from embtune.cli.loss_data import check_columns, check_labels
from embtune.cli.tasks import EvaluationTask, check_inherited
from embtune.cli.train_config import TrainConfig
from embtune.data.checks import check_overlap, check_training_data
from embtune.data.columns import LABEL_ROLES, ColumnRoles
from embtune.data.general_text import general_retrieval
from embtune.data.readers import read_dataset, read_raw
from embtune.data.retrieval import RetrievalData
from embtune.data.same_text import shortened
from embtune.errors import ArgumentError, EmbtuneWarning

SAMPLES = 2
PROSE_QUERIES = 200
# Texts of a data set that prose is compared with: what training has seen says nothing about forgetting.
_COMPARED_WITH_PROSE = 5_000


@dataclass(frozen=True)
class ColumnSample:
    """A column as it was understood."""

    name: str
    """The data's own name."""
    role: str | None
    """What it is used as; None where it is not."""
    cells: tuple[str, ...]
    """Its first cells, shortened."""


@dataclass(frozen=True)
class SourceFacts:
    """A data set as the preflight shows it."""

    source: str
    """File or Hub name."""
    rows: int
    """How many there are."""
    columns: tuple[ColumnSample, ...]
    """All columns of the source."""
    separator: str | None
    """What stands between the cells of a delimited file."""


@dataclass(frozen=True)
class RunData:
    """Everything that a run reads."""

    train: dict[str, Dataset]
    """Name -> rows, their columns named by role."""
    tasks: dict[str, EvaluationTask]
    """Name -> what is measured before and after; the first decides which checkpoint is best."""
    prose: RetrievalData | None
    """What is measured so that forgetting shows."""
    facts: dict[str, SourceFacts]
    """Name -> how the training data was understood."""
    findings: tuple[str, ...]
    """What is odd about the rows; each was a warning, too."""


def read_run_data(config: TrainConfig, console: Console) -> RunData:
    """Read and check all data of a run.

    Raises:
        ArgumentError, DataError: the data cannot be used, or does not suit the loss; the message says which and where.
    """
    train = dict(_training_sets(config, console))
    columns = {column for rows in train.values() for column in rows.column_names}
    for column in config.more.prompts:
        if column not in columns:
            raise ArgumentError(f"prompts: there is no column {column!r}; there are {', '.join(sorted(columns))}.")
    tasks = dict(_tasks(config, console))
    if config.more.eval_k is not None and all(task.kind != "retrieval" for task in tasks.values()):
        raise ArgumentError(f"eval_k={config.more.eval_k} is the depth of retrieval, which nothing measures here.")
    findings = check_training_data(_one_or_all(train), batch_size=config.batch_size)
    for task in tasks.values():
        findings += check_overlap(_one_or_all(train), task.data)
    facts = {name: _facts(config, name, rows) for name, rows in train.items()}
    prose = _prose(train) if tasks and config.more.forgetting_check else None
    return RunData(train, tasks, prose, facts, tuple(findings))


def _training_sets(config: TrainConfig, console: Console) -> Iterator[tuple[str, Dataset]]:
    for name, source in config.data.items():
        with working(console, f"Reading {source}"):
            rows = read_dataset(source, columns=config.columns_of(name) or None)
        console.print(f"{len(rows):,} rows with {', '.join(rows.column_names)}.")
        check_columns(config.loss_of(name), source, rows)
        check_labels(config.loss_of(name), config.loss_args_of(name), source, rows)
        yield name, rows


def _tasks(config: TrainConfig, console: Console) -> Iterator[tuple[str, EvaluationTask]]:
    more = config.more
    for name, source in config.eval_data.items():
        with working(console, f"Reading {source}"):
            kind, columns = more.eval_tasks.get(name, "auto"), config.eval_columns_of(name)
            if columns and not more.eval_columns:
                check_inherited(source, columns, more.eval_split)
            task = EvaluationTask.read(
                source,
                columns,
                more.eval_split,
                task=kind,
                train_data=more.eval_train_data.get(name),
            )
        if task.kind == "retrieval" and more.eval_k is not None:
            task = replace(task, k=more.eval_k)
        console.print(f"Measured on {task}.")
        task.check_comparable()
        yield name, task


def _one_or_all(train: dict[str, Dataset]) -> Dataset | Mapping[str, Dataset]:
    return train if len(train) > 1 else next(iter(train.values()))


def _prose(train: Mapping[str, Dataset]) -> RetrievalData | None:
    if importlib.util.find_spec("pydoc_data") is None:
        why = "This Python lacks pydoc_data, of which the forgetting check is made; the run goes without it."
        warnings.warn(why, EmbtuneWarning, stacklevel=2)
        return None
    seen = [
        text
        for rows in train.values()
        for column in rows.column_names
        if column not in LABEL_ROLES
        for text in rows[column][:_COMPARED_WITH_PROSE]
    ]
    return general_retrieval(seen, limit=PROSE_QUERIES)


def _facts(config: TrainConfig, name: str, rows: Dataset) -> SourceFacts:
    source = config.data[name]
    raw = read_raw(source)
    samples = [row for _, row in islice(raw.rows, SAMPLES)]
    mapping = config.columns_of(name) or None
    roles = dict(ColumnRoles.from_names(list(samples[0]), mapping, source))
    columns = [
        ColumnSample(column, roles.get(column), tuple(_cell(sample.get(column)) for sample in samples))
        for column in samples[0]
    ]
    return SourceFacts(source, len(rows), tuple(columns), raw.separator)


def _cell(value: Any) -> str:
    return shortened(" ".join(str(value).split()), 48)
