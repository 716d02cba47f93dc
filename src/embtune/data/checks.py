"""What can be wrong with rows that are each in order: duplicates, leaks, too few for a batch."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset

from embtune.data.columns import LABEL_ROLES, ColumnRoles, canonical
from embtune.data.retrieval import RetrievalData
from embtune.data.same_text import digest, normal, shortened
from embtune.data.tables import check_cells
from embtune.errors import DataError, PreflightWarning

_EXAMPLES = 3

Rows: TypeAlias = Dataset | Mapping[str, Dataset | IterableDataset]
"""One data set, or several by name."""


def check_training_data(
    train: Rows, evaluation: Rows | RetrievalData | None = None, batch_size: int | None = None
) -> list[str]:
    """Warn about duplicate rows, pairs that teach nothing, and evaluation texts that training has seen.

    Texts count as the same if they differ in case, white space or Unicode form only. Of `RetrievalData` the queries
    are looked for: that its documents occur in training is common and fair.

    Args:
        train, evaluation: rows, their columns recognisable by name; several data sets are checked each, except
            streams, which can be read once.
        batch_size: rows of one step over all devices; of several data sets one at least must fill it.

    Returns:
        The warnings' texts, each with row numbers counted from 1.

    Raises:
        DataError: there are fewer rows than one batch holds, a cell of a text column is no text, or a label is NaN.
    """
    if batch_size is not None:
        _check_size(train, batch_size)
    parts = {of: _prepared(part, f"the training data{of}") for of, part in _by_suffix(train).items()}
    findings = [finding for of, part in parts.items() for finding in _within(part, f"training rows{of}")]
    if evaluation is not None:
        findings += _leaks(parts.values(), evaluation)
    return _warned(finding for finding in findings if finding)


def check_overlap(train: Rows, evaluation: Rows | RetrievalData) -> list[str]:
    """The part of `check_training_data` that looks for evaluation texts in training data, warnings included."""
    return _warned(_leaks(_by_suffix(train).values(), evaluation))


def _warned(findings: Iterable[str]) -> list[str]:
    found = list(findings)
    for finding in found:
        warnings.warn(finding, PreflightWarning, stacklevel=3)
    return found


def _check_size(train: Rows, batch_size: int) -> None:
    parts = list(train.values()) if isinstance(train, Mapping) else [train]
    if not all(isinstance(part, Dataset) for part in parts):
        return
    rows = max(map(len, parts))
    if rows < batch_size:
        what = "The training data has" if len(parts) == 1 else "The longest of the training data sets has"
        raise DataError(
            f"{what} {rows} rows, but a batch holds {batch_size}. Add rows or set the batch size to at most {rows}."
        )


def _by_suffix(rows: Rows) -> dict[str, Dataset]:
    """Each data set by what messages put behind "the training data": nothing for one, its name among several."""
    if not isinstance(rows, Mapping):
        return {"": rows}
    return {f" {name!r}": part for name, part in rows.items() if isinstance(part, Dataset)}


def _within(rows: Dataset, what: str) -> list[str | None]:
    """The findings of one training set that need no other; `what` names its rows."""
    negatives = [role for role in _text_roles(rows) if role.startswith("negative")]
    return [
        _duplicates(rows, what),
        _identical(rows, "anchor", "positive", what),
        *(_identical(rows, "positive", role, what) for role in negatives),
    ]


def _prepared(dataset: Dataset, source: str) -> Dataset:
    dataset = canonical(dataset, source=source)
    # Of labels only those that are to be numbers: one that is NaN would make every weight it trains NaN.
    numbers = [name for name in dataset.column_names if name in LABEL_ROLES and _holds_floats(dataset, name)]
    roles = ColumnRoles.from_names([*_text_roles(dataset), *numbers], source=source)
    check_cells(dataset, roles, lambda index: f"{source}, row {index + 1} (dataset[{index}])")
    return dataset


def _holds_floats(dataset: Dataset, column: str) -> bool:
    return str(getattr(dataset.features[column], "dtype", "")).startswith("float")


def _duplicates(train: Dataset, what: str) -> str | None:
    first: dict[bytes, int] = {}
    repeats: list[tuple[int, int]] = []
    count = 0
    for number, row in enumerate(_rows(train, train.column_names), 1):
        earlier = first.setdefault(digest(repr(row)), number)
        if earlier != number:
            count += 1
            if count <= _EXAMPLES:
                repeats.append((number, earlier))
    if not count:
        return None
    examples = ", ".join(f"row {number} is row {earlier}" for number, earlier in repeats)
    why = " In a batch a repeated pair is its own negative." if "anchor" in train.column_names else ""
    return f"{count} of {len(train)} {what} repeat an earlier row ({examples}). Remove them.{why}"


def _identical(train: Dataset, one: str, other: str, what: str) -> str | None:
    if not {one, other} <= set(train.column_names):
        return None
    pairs = enumerate(_rows(train, [one, other]), 1)
    rows = [number for number, (left, right) in pairs if normal(left) == normal(right)]
    if not rows:
        return None
    return (
        f"In {len(rows)} of {len(train)} {what} {one} and {other} are the same text "
        f"({_numbers(rows)}). Such a row teaches nothing useful; remove it."
    )


def _leaks(train: Iterable[Dataset], evaluation: Rows | RetrievalData) -> list[str]:
    """The findings of evaluation data beside what is trained on."""
    seen = {digest(normal(text)) for part in train for role in _text_roles(part) for text in _texts(part, role)}
    if isinstance(evaluation, RetrievalData):
        queries = evaluation.queries.values()
        return _overlaps(seen, {"query": queries}, len(queries), "evaluation rows")
    found = []
    for of, part in _by_suffix(evaluation).items():
        part = _prepared(part, f"the evaluation data{of}")
        columns = {role: _texts(part, role) for role in _text_roles(part)}
        found += _overlaps(seen, columns, len(part), f"evaluation rows{of}")
    return found


def _overlaps(seen: Set[bytes], columns: Mapping[str, Iterable[str]], total: int, what: str) -> list[str]:
    """The columns of evaluation data that hold texts of `seen`, digests of all training texts."""
    found = {
        role: [(number, text) for number, text in enumerate(texts, 1) if digest(normal(text)) in seen]
        for role, texts in columns.items()
    }
    return [
        f"{len(hits)} of {total} {what} have as {role} a text that training has seen "
        f"({_numbers([number for number, _ in hits])}, such as {shortened(hits[0][1])!r}). The result will flatter "
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


def _numbers(rows: list[int]) -> str:
    more = ", …" if len(rows) > _EXAMPLES else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:_EXAMPLES]))}{more}"
