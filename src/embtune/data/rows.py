"""Rows of a file become columns of a data set, each cell checked on the way."""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from embtune.data.columns import ColumnRoles, as_option, role_of
from embtune.data.tables import to_dataset
from embtune.data.values import explain_form, explain_label, explain_text, form, is_label, is_text
from embtune.errors import DataError

_CHUNK = 10_000


def collect(
    path: Path,
    rows: Iterator[tuple[int, dict[str, Any]]],
    mapping: Mapping[str, str] | None,
    parse_label: Callable[[Any], Any] | None = None,
) -> Dataset:
    """Make a data set with canonical columns from (line number, row) pairs.

    Args:
        parse_label: applied to label cells first, for formats whose cells are all text.

    Raises:
        DataError: there is no row; a row has other keys than the first; a cell is neither a text nor a label.
    """
    first = next(rows, None)
    if first is None:
        raise DataError(f"{path} holds no rows. It needs at least one, with columns such as anchor and positive.")
    roles = ColumnRoles.from_names(first[1], mapping, f"{path}, line {first[0]}")
    expected = roles.columns if mapping is not None else tuple(first[1])
    columns = _Columns(path, roles)
    for count, (line, row) in enumerate(chain([first], rows), 1):
        _check_keys(f"{path}, line {line}", row, expected, exact=mapping is None)
        columns.append(line, row, parse_label)
        if count % _CHUNK == 0:
            columns.flush()
    return columns.dataset()


class _Columns:
    """Columns that grow; their texts move to Arrow at every flush, so Python holds few of them at a time."""

    def __init__(self, path: Path, roles: ColumnRoles) -> None:
        self.path, self.roles, self.texts = path, roles, roles.texts
        self.buffers: dict[str, list[str]] = {name: [] for name in self.texts}
        self.chunks: dict[str, list[pa.Array]] = {name: [] for name in self.texts}
        self.labels: list[Any] = []
        self.form: int | None = None

    def append(self, line: int, row: dict[str, Any], parse_label: Callable[[Any], Any] | None) -> None:
        for name, buffer in self.buffers.items():
            if not is_text(row[name]):
                raise DataError(f"{self.path}, line {line}, column {name!r} {explain_text(row[name])}")
            buffer.append(row[name])
        label_name = self.roles.label
        if label_name is not None:
            label = parse_label(row[label_name]) if parse_label else row[label_name]
            if not is_label(label):
                raise DataError(f"{self.path}, line {line}, column {label_name!r} {explain_label(label, self.texts)}")
            if not self.labels:
                self.form = form(label)
            if form(label) != self.form:
                raise DataError(f"{self.path}, line {line}, column {label_name!r} {explain_form(label, self.form)}")
            self.labels.append(label)

    def flush(self) -> None:
        for name, buffer in self.buffers.items():
            self.chunks[name].append(pa.array(buffer, pa.string()))
            buffer.clear()

    def dataset(self) -> Dataset:
        self.flush()
        columns = {role: pa.chunked_array(self.chunks[name], pa.string()) for name, role in self.texts.items()}
        if self.labels:
            columns[self.roles.roles[-1]] = _label_array(self.labels)
        return to_dataset(pa.table(columns))


def _check_keys(where: str, row: dict[str, Any], expected: tuple[str, ...], *, exact: bool) -> None:
    missing = [name for name in expected if name not in row]
    if missing:
        raise DataError(f"{where}: column {missing[0]!r} is missing. Every row needs {', '.join(expected)}.")
    if exact and len(row) > len(expected):
        extra = next(name for name in row if name not in expected)
        raise DataError(
            f"{where}: column {extra!r} is extra; the rows before lack it. Give every row the same columns, or choose "
            f"some: {as_option({name: role_of(name) or name for name in expected})}."
        )


def _label_array(labels: list[Any]) -> pa.Array:
    """Labels of one form as an Arrow array of int64 or float64, or of lists of them."""
    flat = labels if form(labels[0]) is None else list(chain.from_iterable(labels))
    kind = pa.int64()
    if not all(type(item) is int for item in flat):
        # Arrow refuses to make a float of an integer beyond 2**53; Python rounds it.
        labels = [[float(item) for item in label] if isinstance(label, list) else float(label) for label in labels]
        kind = pa.float64()
    return pa.array(labels, pa.list_(kind) if isinstance(labels[0], list) else kind)
