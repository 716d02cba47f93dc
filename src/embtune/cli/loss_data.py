"""Whether a data set suits the loss it is for: its columns, and its labels."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from embtune.cli.loss_table import LOSS_INPUTS
from embtune.data.columns import LABEL_ROLES
from embtune.errors import DataError


def check_columns(loss: str, source: str, dataset: Dataset) -> None:
    """Raise unless the loss of that name can read the columns of `dataset`, which messages call `source`.

    Raises:
        DataError: the loss reads other columns.
    """
    wanted = LOSS_INPUTS[loss]
    columns = dataset.column_names
    labels = [column for column in columns if column in LABEL_ROLES]
    texts = len(columns) - len(labels)
    if wanted.label != bool(labels) or texts < wanted.least or (wanted.most is not None and texts > wanted.most):
        raise DataError(
            f"{source} has the columns {', '.join(columns)}, but {loss} reads {wanted}. "
            "Choose the columns with columns (its_name=role), or another loss."
        )


_MARKED = ("ContrastiveLoss", "OnlineContrastiveLoss", "ContrastiveTensionLoss")


def check_labels(loss: str, arguments: Mapping[str, Any], source: str, dataset: Dataset) -> None:
    """Raise unless every label is one that the loss of that name, with its arguments, can reach or count.

    Raises:
        DataError: one is not; the message names its data set (`source`), row and column.
    """
    classes = arguments.get("num_labels")
    if loss == "CosineSimilarityLoss":
        expected = "a number from -1 to 1. A cosine has no other value; divide scores of 0 to 5 by 5."
    elif loss in _MARKED:
        expected = "0 or 1, far or near. CoSENTLoss takes any score."
    elif loss == "SoftmaxLoss" and isinstance(classes, int):
        expected = f"the number of a class, a whole one from 0 and below num_labels={classes}."
    else:
        return
    column = next(column for column in dataset.column_names if column in LABEL_ROLES)
    for row, value in enumerate(dataset[column], 1):
        if not _is_reachable(loss, value, classes):
            raise DataError(f"{source}, row {row}, column {column!r} is {value!r}, but {loss} needs {expected}")


def _is_reachable(loss: str, value: Any, classes: Any) -> bool:
    if loss == "CosineSimilarityLoss":
        return isinstance(value, int | float) and -1 <= value <= 1
    if loss in _MARKED:
        return value in (0, 1)
    return isinstance(value, int) and 0 <= value < classes
