"""One function per file format: JSON Lines, JSON, CSV and TSV, Parquet."""

import csv
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from embtune.data.columns import ColumnRoles, as_option, canonical, role_of
from embtune.data.lines import decoded_lines, json_list, json_objects, reading
from embtune.data.rows import collect
from embtune.data.tables import check_cells, to_dataset
from embtune.data.values import parse_number
from embtune.errors import DataError

SEPARATORS: Mapping[str, str] = {",": "commas", ";": "semicolons", "\t": "tabs"}
"""What may stand between the cells of a delimited file, and how messages call it."""

_USUAL_SEPARATOR = {".csv": ",", ".tsv": "\t"}
_LOOKED_AT = 20  # records, to recognise the separator
_ROWS = 1_000  # of a Parquet file, held at a time


def read_jsonl(path: Path, mapping: Mapping[str, str] | None = None, limit: int | None = None) -> Dataset:
    """Read one JSON object per line."""
    return collect(path, islice(json_objects(path), limit), mapping)


def read_json(path: Path, mapping: Mapping[str, str] | None = None, limit: int | None = None) -> Dataset:
    """Read one JSON list of objects."""
    return collect(path, islice(json_list(path), limit), mapping)


def read_csv(path: Path, mapping: Mapping[str, str] | None = None, limit: int | None = None) -> Dataset:
    """Read comma-separated values with a header, quoted as spreadsheets do; semicolons and tabs are recognised."""
    return _read_delimited(path, mapping, limit)


def read_tsv(path: Path, mapping: Mapping[str, str] | None = None, limit: int | None = None) -> Dataset:
    """Read tab-separated values with a header, quoted as spreadsheets do; commas and semicolons are recognised."""
    return _read_delimited(path, mapping, limit)


def read_parquet(path: Path, mapping: Mapping[str, str] | None = None, limit: int | None = None) -> Dataset:
    """Read a Parquet file; messages count its rows from 1."""
    try:
        with reading(path), path.open("rb") as file:
            parquet = pq.ParquetFile(file)
            roles = ColumnRoles.from_names(parquet.schema_arrow.names, mapping, str(path))
            table = parquet.read(columns=list(roles.columns))
            table.validate(full=True)
    except pa.ArrowException as error:
        raise _no_parquet(path, error) from error
    dataset = to_dataset(_plain(table.slice(0, limit)))
    check_cells(dataset, roles, lambda index: f"{path}, row {index + 1}")
    return canonical(dataset, dict(roles), source=str(path))


def _plain(table: pa.Table) -> pa.Table:
    """`table` without dictionary columns (which `datasets` cannot hold) and without another library's metadata."""
    for index, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            column = table.column(index).cast(field.type.value_type)
            table = table.set_column(index, field.name, column)
    return table.replace_schema_metadata(None)


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number, row), counted from 1."""
    try:
        with reading(path), path.open("rb") as file:
            batches = pq.ParquetFile(file).iter_batches(batch_size=_ROWS)
            yield from enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1)
    except pa.ArrowException as error:
        raise _no_parquet(path, error) from error


def _no_parquet(path: Path, error: pa.ArrowException) -> DataError:
    reason = str(error).rstrip(".")
    return DataError(f"{path} is no whole Parquet file: {reason}. Write it again, or give JSONL or CSV.")


def separator_of(path: Path) -> str:
    """The character between the cells of a .csv or .tsv file with a header: a comma, a semicolon or a tab.

    It is the one that the ending promises if the header has it and the rows agree; else another of which both is true.
    """
    usual = _USUAL_SEPARATOR[path.suffix.lower()]
    found = {}
    for separator in sorted(SEPARATORS, key=lambda each: each != usual):
        widths = _widths(path, separator)
        if widths and widths[0] > 1:
            found[separator] = len(set(widths)) == 1
    agreeing = [separator for separator, agrees in found.items() if agrees]
    return next(iter([*agreeing, *found]), usual)


def _widths(path: Path, separator: str) -> list[int]:
    """How many cells each of the first records has; those from a broken one on are left out."""
    widths = []
    with suppress(csv.Error):
        lines = (text for _, text in decoded_lines(path))
        for cells in islice(filter(None, csv.reader(lines, delimiter=separator, strict=True)), _LOOKED_AT):
            widths.append(len(cells))  # noqa: PERF401 (what came before an error counts)
    return widths


def _read_delimited(path: Path, mapping: Mapping[str, str] | None, limit: int | None) -> Dataset:
    rows = _delimited_rows(path, partial(_check_roles, mapping))
    return collect(path, islice(rows, limit), mapping, parse_number)


def _delimited_rows(
    path: Path, check: Callable[[str, list[str]], None] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (first line, row) behind the header, which `check` may refuse; blank lines are skipped."""
    records = _records(path, separator_of(path))
    line, header = next(records, (1, []))
    if not header:
        return
    where = f"{path}, line {line}"
    _check_header(where, header)
    if check is not None:
        check(where, header)
    for line, cells in records:
        if len(cells) != len(header):
            raise DataError(
                f"{path}, line {line}: {len(cells)} cells, but the header names {len(header)} columns "
                f'({", ".join(header)}). Put texts that contain the separator or a line break in double quotes, "…".'
            )
        yield line, dict(zip(header, cells, strict=True))


def _records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader((text for _, text in decoded_lines(path)), delimiter=delimiter, strict=True)
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {line}: the record that begins here is broken ({error}). Most often a quote is not closed, "
            'or a " inside a quoted text is not doubled (""). Long texts are safer in JSONL or Parquet.'
        ) from error


def _check_header(where: str, header: list[str]) -> None:
    for number, name in enumerate(header, 1):
        if not name.strip():
            raise DataError(f"{where}: column {number} of the header has no name. Name every column.")
        if header.count(name) > 1:
            raise DataError(f"{where}: the header names column {name!r} twice. Rename or remove one.")


def _check_roles(mapping: Mapping[str, str] | None, where: str, header: list[str]) -> None:
    if mapping is None and not any(map(role_of, header)):
        roles = zip(header, ("anchor", "positive"), strict=False)
        raise DataError(
            f"{where}: no column name is known in {header!r}. If this is a row and the header is missing, put one such "
            f"as anchor,positive above it; if it is the header, say what the columns are: {as_option(dict(roles))}."
        )
    ColumnRoles.from_names(header, mapping, where)  # so that its messages name the header's line


READERS: Mapping[str, Callable[[Path, Mapping[str, str] | None, int | None], Dataset]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}
"""File ending, in lower case, to the function that reads it."""

RAW_ROWS: Mapping[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".jsonl": json_objects,
    ".ndjson": json_objects,
    ".json": json_list,
    ".csv": _delimited_rows,
    ".tsv": _delimited_rows,
    ".parquet": _parquet_rows,
}
"""The same endings, to the function that yields (number, row) of a file as it is: cells and names unchecked."""
