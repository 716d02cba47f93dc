"""Data that is in Arrow already: made a data set, and checked."""

import hashlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from embtune.data.columns import ColumnRoles
from embtune.data.values import explain_form, explain_label, explain_text, form, is_label, is_text
from embtune.errors import DataError

_BATCH = 10_000


def to_dataset(table: pa.Table) -> Dataset:
    """An in-memory data set whose fingerprint depends on the content alone.

    `datasets` would compute it by pickling the whole table, which takes several times the table's memory: 1.4 GiB for
    0.3 GiB of texts.
    """
    digest = hashlib.blake2b(table.schema.serialize(), digest_size=8)
    for batch in table.to_batches(max_chunksize=_BATCH):
        digest.update(batch.serialize())
    return Dataset(table, fingerprint=digest.hexdigest())


def check_cells(dataset: Dataset, roles: ColumnRoles, where: Callable[[int], str]) -> None:
    """Raise `DataError` at the first cell that is neither a text nor a label, or if there is no row.

    Args:
        roles: the columns of `dataset` to check.
        where: names the row of a 0-based index.
    """
    if not len(dataset):
        raise DataError(f"{roles.source} holds no rows. It needs at least one.")
    start = 0
    dataset = dataset.select_columns(list(roles.columns)).with_format(None)
    first_form = None if roles.label is None else form(dataset[0][roles.label])
    for table in dataset.with_format("arrow").iter(batch_size=_BATCH):
        for name in roles.columns:
            column = table[name]
            problem = _text_problem(column) if name in roles.texts else _label_problem(column, first_form, roles.texts)
            if problem is not None:
                index, reason = problem
                raise DataError(f"{where(start + index)}, column {name!r} {reason}")
        start += len(table)


def _text_problem(column: pa.ChunkedArray) -> tuple[int, str] | None:
    """Index and explanation of the first cell that is no text, or None."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        blank = pc.equal(pc.utf8_trim_whitespace(column), "")
        suspects = pc.fill_null(pc.or_(blank, pc.match_substring(column, "\0")), True)
    else:
        suspects = column.is_valid() if column.null_count < len(column) else column.is_null()
    for index in np.flatnonzero(suspects.to_numpy()):
        value = column[int(index)].as_py()
        if not is_text(value):
            return int(index), explain_text(value)
    return None


def _label_problem(column: pa.ChunkedArray, first_form: int | None, texts: dict[str, str]) -> tuple[int, str] | None:
    """Index and explanation of the first cell that is no label, or not of the first row's form, or None."""
    if _all_finite(column, first_form):
        return None
    for index, cell in enumerate(column.to_pylist()):
        if not is_label(cell):
            return index, explain_label(cell, texts)
        if form(cell) != first_form:
            return index, explain_form(cell, first_form)
    return None


def _all_finite(column: pa.ChunkedArray, length: int | None) -> bool:
    """Whether, as far as Arrow can tell without making Python objects, all cells are labels of one form."""
    if length is not None:
        if column.null_count or not pc.all(pc.equal(pc.list_value_length(column), length)).as_py():
            return False
        column = pc.list_flatten(column)
    if column.null_count or not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        return False
    return pc.all(pc.is_finite(column)).as_py()
