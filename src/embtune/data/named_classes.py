"""Labelled texts whose classes have names; everywhere else a label is a number."""

from collections.abc import Mapping
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
    numbered = list(read_raw(source, split=split).rows)
    roles = {role: name for name in (numbered[0][1] if numbered else ()) if (role := _role(name, columns)) is not None}
    if "label" not in roles or not any(role in roles for role in _TEXT_ROLES) or len(roles) != 2:
        return None
    label = roles.pop("label")
    names = [str(row[label]).strip() for _, row in numbered if is_text(row.get(label))]
    if len(names) < len(numbered) or all(is_label(parse_number(name)) for name in names):
        return None
    [(role, text)] = roles.items()
    try:
        texts = read_dataset(Dataset.from_dict({role: [row.get(text) for _, row in numbered]}))
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    return texts.add_column("label", names)


def _role(name: str, columns: Mapping[str, str] | None) -> str | None:
    return columns.get(name) if columns else role_of(name)
