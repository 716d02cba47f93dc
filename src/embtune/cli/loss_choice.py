"""A loss by its name: which there are, whether the data suits it, and its arguments checked."""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import nn

from embtune import losses
from embtune.api import FastSentenceTransformer
from embtune.data.columns import LABEL_ROLES
from embtune.errors import ArgumentError, DataError


@dataclass(frozen=True)
class LossInput:
    """The columns that a loss reads."""

    least: int
    """Fewest columns of text."""
    most: int | None
    """Most columns of text; None is any number."""
    label: bool
    """Whether it needs a label or score; those that need none would not look at it."""


_PAIR_LABEL, _TEXT_LABEL = LossInput(2, 2, True), LossInput(1, 1, True)
_RANKING, _PAIR = LossInput(2, None, False), LossInput(2, 2, False)

# After the "Loss Overview" of sentence-transformers' documentation. Losses that wrap another are left out:
# MatryoshkaLoss has its own option.
LOSS_INPUTS: Mapping[str, LossInput] = {
    **dict.fromkeys(("CosineSimilarityLoss", "CoSENTLoss", "AnglELoss", "SoftmaxLoss"), _PAIR_LABEL),
    **dict.fromkeys(("ContrastiveLoss", "OnlineContrastiveLoss", "ContrastiveTensionLoss"), _PAIR_LABEL),
    **dict.fromkeys(("BatchAllTripletLoss", "BatchHardTripletLoss"), _TEXT_LABEL),
    **dict.fromkeys(("BatchHardSoftMarginTripletLoss", "BatchSemiHardTripletLoss"), _TEXT_LABEL),
    **dict.fromkeys(("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"), _RANKING),
    **dict.fromkeys(("MultipleNegativesSymmetricRankingLoss", "GlobalOrthogonalRegularizationLoss"), _RANKING),
    "CachedMultipleNegativesSymmetricRankingLoss": _RANKING,
    **dict.fromkeys(("GISTEmbedLoss", "CachedGISTEmbedLoss"), LossInput(2, 3, False)),
    **dict.fromkeys(("MegaBatchMarginLoss", "ContrastiveTensionLossInBatchNegatives"), _PAIR),
    "DenoisingAutoEncoderLoss": _PAIR,
    "TripletLoss": LossInput(3, 3, False),
    **dict.fromkeys(("MSELoss", "EmbedDistillLoss"), LossInput(1, None, True)),
    **dict.fromkeys(("MarginMSELoss", "DistillKLDivLoss"), LossInput(3, None, True)),
}


def check_loss(name: str, datasets: Mapping[str, Dataset]) -> None:
    """Raise unless there is such a loss and it can read the columns of every data set, by what messages call it.

    Raises:
        ArgumentError: there is none of that name.
        DataError: a data set has other columns than the loss reads.
    """
    if name not in LOSS_INPUTS:
        near = difflib.get_close_matches(name, LOSS_INPUTS, 1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(sorted(LOSS_INPUTS))}."
        special = " For Matryoshka set matryoshka_dims." if name.startswith("Matryoshka") else ""
        raise ArgumentError(f"loss={name!r}: there is no such loss.{special} {hint}")
    wanted = LOSS_INPUTS[name]
    for dataset_name, dataset in datasets.items():
        columns = dataset.column_names
        labels = [column for column in columns if column in LABEL_ROLES]
        texts = len(columns) - len(labels)
        if wanted.label != bool(labels) or texts < wanted.least or (wanted.most is not None and texts > wanted.most):
            raise DataError(
                f"{dataset_name} has the columns {', '.join(columns)}, but {name} reads {_describe(wanted)}. "
                "Choose the columns with columns (its_name=role), or another loss."
            )


_MARKED = ("ContrastiveLoss", "OnlineContrastiveLoss", "ContrastiveTensionLoss")


def check_labels(name: str, arguments: Mapping[str, Any], datasets: Mapping[str, Dataset]) -> None:
    """Raise unless every label is one that the loss called `name` can reach or count.

    Raises:
        DataError: one is not; the message names its data set, as `datasets` calls it, row and column.
    """
    classes = arguments.get("num_labels")
    if name == "CosineSimilarityLoss":
        expected = "a number from -1 to 1. A cosine has no other value; divide scores of 0 to 5 by 5."
    elif name in _MARKED:
        expected = "0 or 1, far or near. CoSENTLoss takes any score."
    elif name == "SoftmaxLoss" and isinstance(classes, int):
        expected = f"the number of a class, a whole one from 0 and below num_labels={classes}."
    else:
        return
    for dataset_name, dataset in datasets.items():
        column = next(column for column in dataset.column_names if column in LABEL_ROLES)
        for row, value in enumerate(dataset[column], 1):
            if not _is_reachable(name, value, classes):
                raise DataError(
                    f"{dataset_name}, row {row}, column {column!r} is {value!r}, but {name} needs {expected}"
                )


def _is_reachable(name: str, value: Any, classes: Any) -> bool:
    if name == "CosineSimilarityLoss":
        return isinstance(value, int | float) and -1 <= value <= 1
    if name in _MARKED:
        return value in (0, 1)
    return isinstance(value, int) and 0 <= value < classes


def _describe(wanted: LossInput) -> str:
    if wanted.most is None:
        count = f"at least {wanted.least} columns of text"
    elif wanted.most == wanted.least:
        count = f"{wanted.least} column{'s' if wanted.least > 1 else ''} of text"
    else:
        count = f"{wanted.least} to {wanted.most} columns of text"
    return f"{count} and {'a label or score' if wanted.label else 'no label or score'}"


def make_loss(
    name: str, arguments: Mapping[str, Any], model: SentenceTransformer, matryoshka_dims: Sequence[int] = ()
) -> nn.Module:
    """The loss called `name`, for every prefix of the embedding in `matryoshka_dims` where those are given.

    Raises:
        ArgumentError: an argument does not exist, is missing or has a value that the loss refuses.
    """
    loss_class = getattr(losses, name)
    # Of a class that is marked as deprecated, the class itself shows only (*args, **kwargs).
    parameters = dict(inspect.signature(loss_class.__init__).parameters)
    del parameters["self"], parameters["model"]
    settings = {key: _setting(name, parameters, key, value) for key, value in arguments.items()}
    dimension = model.get_embedding_dimension()
    if "embedding_dimension" in parameters:
        settings.setdefault("embedding_dimension", dimension)
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in settings:
            raise ArgumentError(f"loss_args: {name} needs {key}. Write loss_args as {key}=VALUE.")
    too_long = [size for size in matryoshka_dims if size > dimension]
    if too_long:
        raise ArgumentError(f"matryoshka_dims: {too_long[0]} is more than the {dimension} of this model's embeddings.")
    try:
        loss = loss_class(model, **settings)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"loss_args: {name} refuses {settings}: {error}") from error
    return MatryoshkaLoss(model, loss, list(matryoshka_dims)) if matryoshka_dims else loss


def _setting(name: str, parameters: Mapping[str, inspect.Parameter], key: str, value: Any) -> Any:
    if key not in parameters:
        near = difflib.get_close_matches(key, parameters, 1)
        hint = f"Did you mean {near[0]}?" if near else f"It has {', '.join(parameters) or 'none'}."
        raise ArgumentError(f"loss_args: {name} has no argument {key!r}. {hint}")
    if key == "guide":
        return FastSentenceTransformer.from_pretrained(str(value), for_inference=True, engine="reference")
    default = parameters[key].default
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if callable(default) and default is not inspect.Parameter.empty:
        raise ArgumentError(f"loss_args: {key} of {name} is a function, which only a Python program can give.")
    if isinstance(default, bool) and not isinstance(value, bool):
        raise ArgumentError(f"loss_args: {key}={value!r} of {name} must be true or false.")
    if isinstance(default, int | float) and not isinstance(default, bool) and not number:
        raise ArgumentError(f"loss_args: {key}={value!r} of {name} must be a number.")
    return value
