"""Tasks of MTEB by name, measured by the `mteb` package itself where it and a task's data are there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sentence_transformers import SentenceTransformer

from embtune.errors import ArgumentError, DataError
from embtune.runtime import require


@dataclass(frozen=True)
class MtebScore:
    """A model's main score on one task."""

    task: str
    """The task's name."""
    metric: str
    """What the task calls its main score, such as `ndcg_at_10`; higher is better."""
    score: float
    """Mean over the task's subsets and splits, as `mteb` computes it."""


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
    import mteb

    return [_measured(mteb, model, task, batch_size) for task in tasks]


def _measured(mteb: Any, model: SentenceTransformer, task: Any, batch_size: int) -> MtebScore:
    name = task.metadata.name
    try:
        result = mteb.evaluate(
            model,
            task,
            cache=None,
            co2_tracker=False,
            show_progress_bar=False,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
        )
    except OSError as error:  # of the Hub's clients: offline, no such data set, no right to read it
        raise DataError(
            f"The data of the MTEB task {name} could not be read: {error}. Download them once with a connection to the "
            "Hub, and they stay in its cache; or measure on data of your own (--data)."
        ) from error
    return MtebScore(name, task.metadata.main_score, float(result.task_results[0].get_score()))
