"""Which columns of unknown data could play which role: by their names, else a guess that a person has to confirm."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from embtune.data.columns import LABEL_ROLES, ColumnRoles, role_of
from embtune.data.values import is_label, is_text, parse_number
from embtune.errors import DataError


@dataclass(frozen=True)
class RecognisedColumns:
    """What columns seem to be."""

    roles: Mapping[str, str]
    """Column -> role, for those that are used."""
    unused: tuple[str, ...]
    """The others."""
    guessed: bool
    """Whether a role does not follow from its column's name."""


def recognise_columns(rows: Sequence[Mapping[str, Any]], source: str) -> RecognisedColumns:
    """Find the roles of columns.

    Names decide where they say enough for a layout that can be trained on. Else it is a guess by words of the names and
    by content: of two columns of text that say nothing the one with the shorter texts is the anchor; beside a label
    they are sentence1 and sentence2, and a single one is the text. A label that is no number is not used, nor one
    beside three texts and more, where it could mean several things.

    Args:
        rows: a sample of the data, cells unchecked.

    Raises:
        DataError: there are no rows, or the texts are too few for any layout; the message lists the columns.
    """
    if not rows:
        raise DataError(f"{source} holds no rows. It needs at least one.")
    names = list(rows[0])
    known = {name: role for name in names if (role := role_of(name)) is not None}
    label = next((name for name, role in known.items() if role in LABEL_ROLES), None)
    if label is not None and (len(known) > 3 or not _is_number(label, rows)):
        del known[label]
    roles = known if _is_layout(known) else _guess(names, known, rows, source)
    unused = tuple(name for name in names if name not in roles)
    return RecognisedColumns(roles, unused, roles is not known)


def _is_layout(roles: Mapping[str, str]) -> bool:
    try:
        found = ColumnRoles.from_names(roles, roles) if roles else None
    except DataError:
        return False
    # A text alone trains nothing; with a label it does.
    return found is not None and (len(found.texts) > 1 or found.label is not None)


def _guess(
    names: Sequence[str], known: Mapping[str, str], rows: Sequence[Mapping[str, Any]], source: str
) -> dict[str, str]:
    lengths = {name: _mean_length(name, rows) for name in names if known.get(name) not in LABEL_ROLES}
    texts = sorted((name for name, length in lengths.items() if length), key=lambda name: lengths[name])
    label = next((name for name, role in known.items() if role in LABEL_ROLES), None)
    if len(texts) >= 2:
        first, second = _two(texts, {name: known.get(name) or _hint(name) for name in texts})
        if label is None:
            return {first: "anchor", second: "positive"}
        in_order = sorted((first, second), key=list(names).index)
        return {in_order[0]: "sentence1", in_order[1]: "sentence2", label: known[label]}
    if texts and label is not None:
        return {texts[0]: "text", label: known[label]}
    raise DataError(
        f"{source}: training needs two columns of text, or one and a label; columns: {', '.join(map(repr, names))}, of "
        f"which {', '.join(map(repr, texts)) or 'none'} holds texts. Give the file what is missing."
    )


def _hint(name: str) -> str | None:
    """The role that one word of a column's name says (`"Question text"` -> anchor), if no other says anything else."""
    said = {role_of(word) for word in re.findall(r"[^\W\d_]+", name)} & {"anchor", "positive"}
    return said.pop() if len(said) == 1 else None


def _two(texts: Sequence[str], known: Mapping[str, str | None]) -> tuple[str, str]:
    """Anchor and positive among columns sorted by length: what a name says, else the two with the longest texts."""
    anchor = next((name for name in texts if known.get(name) == "anchor"), None)
    positive = next((name for name in texts if known.get(name) == "positive" and name != anchor), None)
    others = [name for name in texts if name not in (anchor, positive)]
    # The best is at the end; a text that is said to be wrong is the last to be taken.
    others.sort(key=lambda name: not (known.get(name) or "").startswith("negative"))
    if positive is None:
        positive = others.pop()
    return anchor or others.pop(), positive


def _mean_length(name: str, rows: Sequence[Mapping[str, Any]]) -> float:
    """Mean number of characters of a column of texts; 0 for any other, and for numbers written as text."""
    cells = [row.get(name) for row in rows]
    texts = [cell for cell in cells if isinstance(cell, str) and is_text(cell)]
    if not texts or any(cell is not None and not isinstance(cell, str) for cell in cells):
        return 0.0
    if all(not isinstance(parse_number(text), str) for text in texts):
        return 0.0
    return sum(map(len, texts)) / len(texts)


def _is_number(name: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    cells = (row.get(name) for row in rows)
    return all(is_label(parse_number(cell) if isinstance(cell, str) else cell) for cell in cells)
