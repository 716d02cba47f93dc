"""What a cell may hold: a text that says something, or a label that is a finite number or a list of them."""

import math
from collections.abc import Mapping
from typing import Any

from embtune.data.columns import as_option

_INT64 = range(-(2**63), 2**63)


def is_text(value: Any) -> bool:
    """Whether `value` is a text with a visible character that tokenizers and Arrow can hold."""
    return type(value) is str and bool(value) and not value.isspace() and _unusable_character(value) is None


def explain_text(value: Any) -> str:
    """Why `value` is no text to train on, and the remedy; for values of which `is_text` is false."""
    if value is None:
        return "is empty (null). Give it a text or remove the row."
    if isinstance(value, str):
        if not value.strip():
            return "is an empty text. Give it a text or remove the row."
        return f"contains {_unusable_character(value)}, which is no text. Remove the character or the row."
    if isinstance(value, bool | int | float):
        return f'is the number {value!r} where text belongs. Write it in quotes, as "{value}".'
    if isinstance(value, list):
        return "is a list where one text belongs. Write one row per text, or the columns negative_1, negative_2, …"
    return f"is a {type(value).__name__} where text belongs. Write the text itself."


def _unusable_character(text: str) -> str | None:
    if "\0" in text:
        return "a NUL character"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"half a surrogate pair (\\u{ord(text[error.start]):04x})"
    return None


def is_label(value: Any) -> bool:
    """Whether `value` is a finite number, or a list of finite numbers with at least one."""
    if isinstance(value, list):
        return bool(value) and all(_is_number(item) for item in value)
    return _is_number(value)


def _is_number(value: Any) -> bool:
    if type(value) is int:
        return value in _INT64
    return type(value) is float and math.isfinite(value)


def explain_label(value: Any, text_columns: Mapping[str, str]) -> str:
    """Why `value` is no label, and the remedy; for values of which `is_label` is false.

    Args:
        text_columns: the mapping of columns to roles that would leave the label out.
    """
    if isinstance(value, bool):
        return f"is {value} where a number belongs. Write 1 for true and 0 for false."
    if value is None or value == "":
        return "is empty where a number belongs. Give it a number or remove the row."
    if isinstance(value, float):
        return f"is {value!r} where a finite number belongs. Give it a number or remove the row."
    return (
        f"is {value!r} where a finite number belongs. Number the classes 0, 1, 2, …, or, if the loss needs no label, "
        f"leave the column out: {as_option(text_columns)}."
    )


def form(label: Any) -> int | None:
    """The length of a label that is a list, or None for a single number; the same in every row of a data set."""
    return len(label) if isinstance(label, list) else None


def explain_form(label: Any, first: int | None) -> str:
    """Why a label of another `form` than the first row's is refused, and the remedy."""
    expected = "one number" if first is None else f"a list of {first} numbers"
    found = "one number" if form(label) is None else f"a list of {form(label)} numbers"
    return f"is {found} where the first row has {expected}. Give every row the same."


def parse_number(text: str) -> int | float | str:
    """The number that a CSV cell holds, or the cell itself where it holds none."""
    if "_" in text:  # Python reads 1_000 as a number; nobody else does
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
