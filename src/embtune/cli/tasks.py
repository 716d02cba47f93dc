"""What a model is measured on: data read and checked once, for any number of models, before one is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset

from embtune.data.columns import LABEL_ROLES
from embtune.data.named_classes import read_named_classes
from embtune.data.readers import read_dataset, read_raw
from embtune.data.retrieval import RetrievalData
from embtune.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from embtune.evaluate.result import EvaluationResult

_READS = {
    "retrieval": "pairs (anchor, positive)",
    "sts": "scored sentences (sentence1, sentence2, score)",
    "clustering": "labelled texts (text, label)",
    "classification": "labelled texts (text, label)",
}
_LABELLED = ("clustering", "classification")
_MAIN_METRIC = {"sts": "spearman", "clustering": "v_measure", "classification": "accuracy"}


def check_inherited(source: str, columns: Mapping[str, str], split: str | None = None) -> None:
    """Raise unless data to measure on has the columns that were named for the data to train on.

    Raises:
        DataError: one is not there; the message says where its own are named.
    """
    _, first = next(iter(read_raw(source, split=split or "train").rows), (0, {}))
    missing = ", ".join(repr(name) for name in columns if name not in first)
    if first and missing:
        raise DataError(
            f"{source} has the columns {', '.join(map(repr, first))}, not {missing} as the training data. Say what "
            "they are with eval_columns (--eval-columns ITS_NAME=ROLE)."
        )


@dataclass(frozen=True)
class EvaluationTask:
    """Data to measure a model on."""

    name: str
    """Its file or folder without the way there, or its Hub name."""
    data: RetrievalData | Dataset
    """Queries and documents; or rows of sentence1, sentence2 and a score, or of a text and its class."""
    kind: str = "retrieval"
    """`retrieval`, `sts`, `clustering` or `classification`."""
    train: Dataset | None = None
    """Classification only: the texts and classes that the probe learns from."""
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
        task: str = "auto",
        train_data: str | None = None,
        k: int | None = None,
        batch_size: int = 64,
    ) -> "EvaluationTask":
        """Read a BEIR folder, or rows from a file or the Hub.

        Args:
            task: what to measure; "auto" knows retrieval and similarity by their columns.
            train_data: labelled texts that the probe of a classification learns from.
            k: depth of the retrieval metrics.

        Raises:
            ArgumentError, DataError: see the message, which names file, line and column.
        """
        path = Path(source).expanduser()
        if path.is_dir():
            if columns:
                raise ArgumentError(f"columns: {source} is a BEIR folder, whose keys are fixed; leave columns out.")
            if task not in ("auto", "retrieval"):
                raise ArgumentError(f"task={task}: {source} is a BEIR folder, which holds queries and documents.")
            found = cls(path.resolve().name, RetrievalData.from_beir(path, split or "test"))
        else:
            rows = _read_rows(source, columns, split or "train")
            kind = _kind(source, rows, task)
            data = RetrievalData.from_pairs(rows) if kind == "retrieval" else rows
            found = cls(path.name if path.exists() else source, data, kind)
        if k is not None and found.kind != "retrieval":
            raise ArgumentError(f"k={k} is the depth of retrieval, but {source} holds {_READS[found.kind]}.")
        if found.kind in _LABELLED:
            found = _labelled(found, source, columns, train_data)
        elif train_data is not None:
            raise ArgumentError(f"train_data={train_data} is for task=classification alone, not for {found.kind}.")
        return replace(found, k=k or cls.k, batch_size=batch_size)

    @property
    def items(self) -> int:
        """Queries, pairs or texts that are scored."""
        return len(self.data.queries) if isinstance(self.data, RetrievalData) else len(self.data)

    @property
    def main_metric(self) -> str:
        """The metric by which the best checkpoint is known."""
        return _MAIN_METRIC.get(self.kind, f"ndcg@{self.k}")

    def check_comparable(self) -> None:
        """Raise unless two models can be compared on this data.

        Raises:
            DataError: there is one item, which says nothing about how sure a difference is.
        """
        if self.items < 2:
            raise DataError(f"{self.name} holds one item to score; comparing two models needs two at least. Add some.")

    def run(self, model: "SentenceTransformer") -> "EvaluationResult":
        """Measure `model`.

        Raises:
            DataError: nothing can be measured on such data; the message names it.
        """
        try:
            return self._run(model)
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from error

    def _run(self, model: "SentenceTransformer") -> "EvaluationResult":
        # Imported here, so that data can be read and refused before PyTorch is there.
        from embtune.evaluate.classification import evaluate_classification
        from embtune.evaluate.clustering import evaluate_clustering
        from embtune.evaluate.retrieval import evaluate_retrieval
        from embtune.evaluate.sts import evaluate_sts

        if isinstance(self.data, RetrievalData):
            return evaluate_retrieval(model, self.data, k=self.k, batch_size=self.batch_size)
        if self.kind == "sts":
            columns = self.data["sentence1"], self.data["sentence2"], self.data[_label(self.data)]
            return evaluate_sts(model, *map(list, columns), batch_size=self.batch_size)
        texts_and_labels = _columns(self.data)
        if self.train is None:
            return evaluate_clustering(model, *texts_and_labels, batch_size=self.batch_size)
        return evaluate_classification(model, *_columns(self.train), *texts_and_labels, batch_size=self.batch_size)

    def __str__(self) -> str:
        if isinstance(self.data, RetrievalData):
            return f"{len(self.data.queries):,} queries and {len(self.data.corpus):,} documents from {self.name}"
        if self.kind == "sts":
            return f"{len(self.data):,} scored pairs of sentences from {self.name}"
        text, label = self.data.column_names
        classes = len(set(self.data[label]))
        probe = "" if self.train is None else f", with a probe trained on {len(self.train):,} others"
        return (
            f"{self.kind} of {len(self.data):,} texts ({text}) in {classes} classes ({label}) from {self.name}{probe}"
        )


def _read_rows(source: str, columns: Mapping[str, str], split: str = "train") -> Dataset:
    named = read_named_classes(source, columns or None, split)
    return read_dataset(source, columns=columns or None, split=split) if named is None else named


def _kind(source: str, rows: Dataset, task: str) -> str:
    """What the columns can serve, which must be what was asked for."""
    label = _label(rows)
    if "anchor" in rows.column_names:
        fitting: tuple[str, ...] = ("retrieval",)
    elif "sentence1" in rows.column_names:
        fitting = ("sts",) if label else ()
    else:
        fitting = _LABELLED if label else ()
    columns = ", ".join(rows.column_names)
    if task in fitting or (task == "auto" and len(fitting) == 1):
        return fitting[0] if task == "auto" else task
    if task == "auto" and fitting:
        raise ArgumentError(
            f"{source} has the columns {columns}, which serve clustering or classification. Say which: --task "
            "clustering, or --task classification --train-data FILE; of `embtune train` they are eval_tasks and "
            "eval_train_data."
        )
    if task == "auto":
        raise DataError(
            f"{source} has the columns {columns}, with which nothing can be measured. Give "
            f"{', '.join(dict.fromkeys(_READS.values()))}, or a BEIR folder."
        )
    raise DataError(
        f"{source} has the columns {columns}, but task={task} reads {_READS[task]}. Say what your columns are with "
        "columns (its_name=role)."
    )


def _labelled(task: EvaluationTask, source: str, columns: Mapping[str, str], train_data: str | None) -> EvaluationTask:
    """A task over classes, checked, with what its probe learns from."""
    assert isinstance(task.data, Dataset)
    classes = _classes(source, task.data)
    if task.kind == "clustering" and train_data is not None:
        raise ArgumentError(f"train_data={train_data} is for task=classification; clustering learns from no labels.")
    if task.kind == "clustering":
        return task
    if train_data is None:
        raise ArgumentError(
            "task=classification needs train_data (of `embtune train`: eval_train_data), labelled texts that its probe "
            "learns from."
        )
    train = _read_rows(train_data, columns)
    _kind(train_data, train, "classification")
    known = set(_classes(train_data, train))
    for number, label in enumerate(classes, 1):
        if label not in known:
            raise DataError(
                f"{source}, row {number}, column {_label(task.data)!r}: no text of {train_data} is of class {label}, "
                "so the probe could never predict it. Add such texts there, or remove the row."
            )
    return replace(task, train=train)


def _classes(source: str, rows: Dataset) -> list[int | str]:
    """The class of each text: its name, or its number."""
    label = _label(rows)
    values = rows[label][:]
    for number, value in enumerate(values, 1):
        if not isinstance(value, str | int | float) or (isinstance(value, float) and value != int(value)):
            raise DataError(
                f"{source}, row {number}, column {label!r} is {value!r} where a class belongs. Give its name or its "
                "number, a whole one."
            )
    if len(set(values)) < 2:
        raise DataError(f"{source}, column {label!r}: every text is of class {values[0]}; two classes are needed.")
    return list(map(_class, values))


def _class(value: str | float) -> int | str:
    return value if isinstance(value, str) else int(value)


def _columns(rows: Dataset) -> tuple[list[str], list[int | str]]:
    text, label = rows.column_names
    return list(rows[text]), list(map(_class, rows[label]))


def _label(rows: Dataset) -> str | None:
    return next((name for name in rows.column_names if name in LABEL_ROLES), None)
