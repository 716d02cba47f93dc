"""Labelled texts whose classes have names; everywhere else a label is a number."""

from collections.abc import Mapping
from itertools import chain
from pathlib import Path

from datasets import Dataset

from embtune.data.columns import role_of
from embtune.data.readers import read_dataset, read_raw
from embtune.data.values import is_label, is_text, parse_number
from embtune.errors import DataError

_TEXT_ROLES = ("text", "sentence")


def read_named_classes(source: str | Path, columns: Mapping[str, str] | None, split: str = "train") -> Dataset | None:
    """One column of texts, and a column `label` of the names of their classes; None where the rows are anything else.

    Args:
        source, columns, split: as for `read_dataset`.

    Raises:
        ArgumentError, DataError: as `read_dataset`.
    """
    rows = (row for _, row in read_raw(source, split=split).rows)
    first = next(rows, {})
    roles = {role: name for name in first if (role := _role(name, columns)) is not None}
    if "label" not in roles or not any(role in roles for role in _TEXT_ROLES) or len(roles) != 2:
        return None
    label = roles.pop("label")
    [(role, text)] = roles.items()
    names, cells = [], []
    for row in chain([first], rows):
        name = row.get(label)
        if not is_text(name):
            return None
        names.append(str(name).strip())
        cells.append(row.get(text))
    if all(is_label(parse_number(name)) for name in names):
        return None
    try:
        texts = read_dataset(Dataset.from_dict({role: cells}))
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    return texts.add_column("label", names)


def _role(name: str, columns: Mapping[str, str] | None) -> str | None:
    return columns.get(name) if columns else role_of(name)
