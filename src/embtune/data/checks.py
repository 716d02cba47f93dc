"""What can be wrong with rows that are each in order: duplicates, leaks, too few for a batch."""

import hashlib
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from datasets import Dataset
from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    CachedGISTEmbedLoss,
    CachedMultipleNegativesRankingLoss,
    GISTEmbedLoss,
    MatryoshkaLoss,
    MegaBatchMarginLoss,
    MultipleNegativesRankingLoss,
)
from torch import nn

from embtune.data.columns import LABEL_ROLES, ColumnRoles, canonical
from embtune.data.retrieval import RetrievalData
from embtune.data.tables import check_cells
from embtune.errors import DataError, EmbtuneWarning

_EXAMPLES = 3
_CACHED = (CachedMultipleNegativesRankingLoss, CachedGISTEmbedLoss)
_IN_BATCH = (MultipleNegativesRankingLoss, GISTEmbedLoss, MegaBatchMarginLoss, *_CACHED)


def check_training_data(
    train: Dataset, evaluation: Dataset | RetrievalData | None = None, batch_size: int | None = None
) -> list[str]:
    """Warn about duplicate rows, pairs that teach nothing, and evaluation texts that training has seen.

    Texts count as the same if they differ in case, white space or Unicode form only. Of `RetrievalData` the queries
    are looked for: that its documents occur in training is common and fair.

    Args:
        train, evaluation: rows, their columns recognisable by name.
        batch_size: rows of one step over all devices.

    Returns:
        The warnings' texts, each with row numbers counted from 1.

    Raises:
        DataError: there are fewer rows than one batch holds, or a cell of a text column is no text.
    """
    if batch_size is not None and len(train) < batch_size:
        raise DataError(
            f"The training data has {len(train)} rows, but a batch holds {batch_size}. "
            f"Add rows or set the batch size to at most {len(train)}."
        )
    train = _prepared(train, "the training data")
    findings = [_duplicates(train), _identical(train, "anchor", "positive")]
    findings += [_identical(train, "positive", role) for role in _text_roles(train) if role.startswith("negative")]
    if evaluation is not None:
        findings += _overlaps(train, evaluation)
    found = [finding for finding in findings if finding]
    for finding in found:
        warnings.warn(finding, EmbtuneWarning, stacklevel=2)
    return found


def warn_about_accumulation(gradient_accumulation_steps: int, loss: nn.Module | Mapping[str, nn.Module]) -> None:
    """Warn that gradient accumulation gives a loss with in-batch negatives no more negatives."""
    if gradient_accumulation_steps <= 1:
        return
    for each in loss.values() if isinstance(loss, Mapping) else [loss]:
        innermost = _unwrap(each)
        if not isinstance(innermost, _IN_BATCH):
            continue
        remedy = (
            "Raise per_device_train_batch_size instead: mini_batch_size already bounds the memory."
            if isinstance(innermost, _CACHED)
            else "For a larger batch in the same memory use CachedMultipleNegativesRankingLoss with a large "
            "per_device_train_batch_size and a small mini_batch_size."
        )
        warnings.warn(
            f"gradient_accumulation_steps={gradient_accumulation_steps} does not enlarge the batch from which "
            f"{type(innermost).__name__} takes its negatives: each part is contrasted within itself only. {remedy}",
            EmbtuneWarning,
            stacklevel=2,
        )


def _unwrap(loss: nn.Module) -> nn.Module:
    while isinstance(loss, MatryoshkaLoss | AdaptiveLayerLoss):
        loss = loss.loss
    return loss


def _prepared(dataset: Dataset, source: str) -> Dataset:
    dataset = canonical(dataset, source=source)
    texts = ColumnRoles.from_names(_text_roles(dataset), source=source)
    check_cells(dataset, texts, lambda index: f"{source}, row {index + 1} (dataset[{index}])")
    return dataset


def _duplicates(train: Dataset) -> str | None:
    first: dict[bytes, int] = {}
    repeats: list[tuple[int, int]] = []
    count = 0
    for number, row in enumerate(_rows(train, train.column_names), 1):
        earlier = first.setdefault(_digest(repr(row)), number)
        if earlier != number:
            count += 1
            if count <= _EXAMPLES:
                repeats.append((number, earlier))
    if not count:
        return None
    examples = ", ".join(f"row {number} is row {earlier}" for number, earlier in repeats)
    why = " In a batch a repeated pair is its own negative." if "anchor" in train.column_names else ""
    return f"{count} of {len(train)} training rows repeat an earlier row ({examples}). Remove them.{why}"


def _identical(train: Dataset, one: str, other: str) -> str | None:
    if not {one, other} <= set(train.column_names):
        return None
    pairs = enumerate(_rows(train, [one, other]), 1)
    rows = [number for number, (left, right) in pairs if _normal(left) == _normal(right)]
    if not rows:
        return None
    return (
        f"In {len(rows)} of {len(train)} training rows {one} and {other} are the same text "
        f"({_numbers(rows)}). Such a row teaches nothing useful; remove it."
    )


def _overlaps(train: Dataset, evaluation: Dataset | RetrievalData) -> list[str]:
    seen = {_digest(_normal(text)) for role in _text_roles(train) for text in _texts(train, role)}
    if isinstance(evaluation, RetrievalData):
        columns: dict[str, Iterable[str]] = {"query": evaluation.queries.values()}
        total = len(evaluation.queries)
    else:
        evaluation = _prepared(evaluation, "the evaluation data")
        columns = {role: _texts(evaluation, role) for role in _text_roles(evaluation)}
        total = len(evaluation)
    found = {
        role: [(number, text) for number, text in enumerate(texts, 1) if _digest(_normal(text)) in seen]
        for role, texts in columns.items()
    }
    return [
        f"{len(hits)} of {total} evaluation rows have as {role} a text that training has seen "
        f"({_numbers([number for number, _ in hits])}, such as {_shortened(hits[0][1])!r}). The result will flatter "
        "the model; take these texts out of the training data."
        for role, hits in found.items()
        if hits
    ]


def _text_roles(dataset: Dataset) -> list[str]:
    return [name for name in dataset.column_names if name not in LABEL_ROLES]


def _rows(dataset: Dataset, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    for batch in dataset.select_columns(columns).with_format(None).iter(batch_size=1_000):
        yield from zip(*(batch[name] for name in columns), strict=True)


def _texts(dataset: Dataset, column: str) -> Iterator[str]:
    return (text for (text,) in _rows(dataset, [column]))


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _numbers(rows: list[int]) -> str:
    more = ", …" if len(rows) > _EXAMPLES else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:_EXAMPLES]))}{more}"


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"
