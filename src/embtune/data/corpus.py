"""A corpus: many texts of one column, to search in."""

from collections.abc import Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from embtune.data.columns import role_of
from embtune.data.readers import RawRows, read_raw
from embtune.data.values import explain_text, is_text
from embtune.errors import ArgumentError, DataError

_TEXT_ROLES = ("positive", "text", "sentence")


def read_corpus(source: str | Path, *, column: str | None = None, split: str = "train") -> list[str]:
    """Read the texts of a file, a Hub data set or a BEIR folder's corpus; empty ones are left out.

    Args:
        column: which column holds them. None takes the only one, or the only one called text, document, passage or
            another name of such a role (`embtune.data.columns.ALIASES`); `title` is put before `text`, as BEIR does.

    Raises:
        ArgumentError: there is no such column.
        DataError: it is not clear which column is meant, or a cell is no text; the message names file and line.
    """
    beir = Path(source).expanduser() / "corpus.jsonl"
    raw = read_raw(beir if beir.is_file() else source, split=split)
    rows = iter(raw.rows)
    first = list(islice(rows, 1))
    name = _column(raw, first[0][1], column) if first else ""
    titled = column is None and name == "text" and "title" in first[0][1]
    texts = []
    for number, row in chain(first, rows):
        text = _text(row.get(name), f"{raw.source}, {raw.unit} {number}, column {name!r}")
        title = row.get("title") if titled else None
        texts.append(f"{title} {text}".strip() if isinstance(title, str) else text)
    texts = [text for text in texts if text]
    if not texts:
        raise DataError(f"{raw.source} holds no texts. A corpus has one a {raw.unit}, in a column called text.")
    return texts


def _text(value: Any, where: str) -> str:
    if is_text(value):
        return value
    if isinstance(value, str) and not value.strip():
        return ""
    raise DataError(f"{where} {explain_text(value)}")


def _column(raw: RawRows, row: Mapping[str, Any], asked: str | None) -> str:
    if asked is not None:
        if asked not in row:
            raise ArgumentError(f"{raw.source} has no column {asked!r}; columns: {', '.join(map(repr, row))}.")
        return asked
    for names in (list(row), [name for name in row if role_of(name) in _TEXT_ROLES]):
        if len(names) == 1:
            return names[0]
    if "text" in row:
        return "text"
    raise DataError(
        f"{raw.source}: which column holds the texts is not clear; columns: {', '.join(map(repr, row))}. Call it text, "
        "or name it with corpus_column."
    )
