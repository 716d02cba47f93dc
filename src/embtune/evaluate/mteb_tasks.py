"""Tasks of MTEB by name, measured by the `mteb` package itself where it and a task's data are there."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from embtune.errors import ArgumentError, DataError
from embtune.evaluate.compare import Comparison, compare
from embtune.evaluate.mteb_items import ClassPart, MtebItems, Part, RetrievalPart, SimilarityPart, mteb_items
from embtune.files import read_json
from embtune.runtime import require

Reader = Callable[[Any, Any, Any], Part]
"""(task, its data, predictions) of one subset and split -> both in one."""


@dataclass(frozen=True)
class MtebScore:
    """A model's main score on one task."""

    task: str
    """The task's name."""
    metric: str
    """What the task calls its main score, such as `ndcg_at_10`; higher is better."""
    score: float
    """Mean over the task's subsets and splits, as `mteb` computes it."""
    items: MtebItems | None = None
    """What each query, pair or text scores; None where `mteb` gives nothing from which that follows."""

    def to_dict(self) -> dict[str, Any]:
        """Task, metric and score, ready for JSON."""
        return {"task": self.task, "metric": self.metric, "score": self.score}

    def compared_with(self, after: "MtebScore") -> Comparison | None:
        """Paired bootstrap of another model's score of the same task against this one; None where items are not known.

        Raises:
            DataError: the scores are of different tasks, or of different data.
        """
        if (self.task, self.metric) != (after.task, after.metric):
            raise DataError(f"{self.task} and {after.task} are different tasks of MTEB.")
        if self.items is None or after.items is None:
            return None
        return compare(self.items, after.items)


def mteb_tasks(names: Sequence[str]) -> list[Any]:
    """The tasks of these names; no data is read yet.

    Raises:
        MissingPackageError: `mteb` is not installed.
        ArgumentError: there is no such task; the message has the nearest name.
    """
    require("mteb", "Measuring tasks of MTEB")
    import mteb

    tasks = []
    for name in names:
        try:
            tasks.append(mteb.get_task(name))
        except KeyError as error:
            reason = str(error.args[0]).strip("\"'")
            raise ArgumentError(f"mteb: there is no such task: {reason}") from error
    return tasks


def evaluate_mteb(model: SentenceTransformer, tasks: Sequence[Any], *, batch_size: int = 64) -> list[MtebScore]:
    """Measure `model` on tasks from `mteb_tasks`, or on any other task object of `mteb`.

    Nothing is kept in `mteb`'s cache of results: the same folder may hold another model tomorrow.

    Raises:
        MissingPackageError: `mteb` is not installed.
        DataError: the data of a task are neither on this machine nor to be had from the Hub.
    """
    require("mteb", "Measuring tasks of MTEB")
    return [_measured(model, task, batch_size) for task in tasks]


def _measured(model: SentenceTransformer, task: Any, batch_size: int) -> MtebScore:
    import mteb

    name, metric = task.metadata.name, task.metadata.main_score
    read = _reader(task)
    loaded_here = read is not None and not task.data_loaded
    try:
        if loaded_here:
            task.load_data()  # mteb lets go of what it loaded itself, the right answers among it
        with tempfile.TemporaryDirectory() as folder:
            result = mteb.evaluate(
                model,
                task,
                cache=None,
                co2_tracker=False,
                show_progress_bar=False,
                encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
                prediction_folder=None if read is None else folder,
            )
            parts = {} if read is None else _parts(task, read, Path(folder))
    except OSError as error:  # of the Hub's clients: offline, no such data set, no right to read it
        raise DataError(
            f"The data of the MTEB task {name} could not be read: {error}. Download them once with a connection to the "
            "Hub, and they stay in its cache; or measure on data of your own (--data)."
        ) from error
    if loaded_here:
        task.unload_data()
    score = float(result.task_results[0].get_score())
    return MtebScore(name, metric, score, mteb_items(metric, score, parts) if parts else None)


def _reader(task: Any) -> Reader | None:
    """Makes a part of the right answers and the predictions of a subset and split; None for other kinds of task."""
    from mteb.abstasks import AbsTaskClassification, AbsTaskRetrieval, AbsTaskSTS

    readers = {AbsTaskRetrieval: _retrieval, AbsTaskSTS: _similarity, AbsTaskClassification: _classes}
    known = (read for kind, read in readers.items() if isinstance(task, kind))
    return next(known, None) if task.metadata.modalities == ["text"] else None


def _parts(task: Any, read: Reader, folder: Path) -> dict[str, Part]:
    """What `mteb` wrote of each subset and split, beside the right answers."""
    try:
        return {
            f"{subset}/{split}": read(task, task.dataset.get(subset, task.dataset)[split], predicted)
            for subset, splits in read_json(folder / task.prediction_file_name).items()
            if subset != "mteb_model_meta"
            for split, predicted in splits.items()
        }
    except (AttributeError, FileNotFoundError, KeyError, TypeError, ValueError):
        # Single tasks have forms of their own, and other versions of mteb may have others; the score stands anyway.
        return {}


def _retrieval(task: Any, data: Any, predicted: Any) -> Part:
    texts = dict(zip(data["queries"]["id"], map(str, data["queries"]["text"]), strict=True))
    return RetrievalPart(predicted, data["relevant_docs"], texts, task.ignore_identical_ids)


def _similarity(task: Any, data: Any, predicted: Any) -> Part:
    first, second = (data[column] for column in task.column_names)
    texts = [f"{left} ↔ {right}" for left, right in zip(first, second, strict=True)]
    similarities = predicted["similarity_scores"] if task.metadata.main_score == "spearman" else None
    return SimilarityPart(similarities or predicted["cosine_scores"], list(data["score"]), texts)


def _classes(task: Any, data: Any, predicted: Any) -> Part:
    column = task.input_column_name
    texts = list(map(str, data[column])) if isinstance(column, str) else [""] * len(data)
    return ClassPart(predicted, list(data[task.label_column_name]), texts)
