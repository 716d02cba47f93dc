"""What every evaluation does first: check texts and labels, and remember which data it was."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from embtune.errors import DataError


def as_texts(name: str, texts: Iterable[str]) -> list[str]:
    """A list of `texts`.

    Raises:
        DataError: it is empty, one string instead of a list, or holds something that is no text.
    """
    if isinstance(texts, str):
        raise DataError(f"{name} is one string; give a list of texts.")
    checked = list(texts)
    if not checked:
        raise DataError(f"{name} is empty; there is nothing to evaluate.")
    for row, text in enumerate(checked):
        if not isinstance(text, str):
            raise DataError(f"{name}[{row}] is {text!r} ({type(text).__name__}); a text is needed.")
    return checked


def as_labels(name: str, labels: Iterable[Any], texts_name: str, texts: Sequence[str]) -> list[Any]:
    """A list of class labels, one for each text.

    Raises:
        DataError: the lengths differ, or a label is neither text nor a whole number.
    """
    checked = list(labels)
    check_same_length(texts_name, texts, name, checked)
    for row, label in enumerate(checked):
        if not isinstance(label, str | int | np.integer):
            raise DataError(f"{name}[{row}] is {label!r}; a class label is a text or a whole number.")
    return [int(label) if isinstance(label, np.integer) else label for label in checked]


def check_same_length(name: str, values: Sequence[Any], other_name: str, others: Sequence[Any]) -> None:
    """Raise `DataError` unless both have the same length."""
    if len(values) != len(others):
        raise DataError(
            f"{name} has {len(values)} rows and {other_name} has {len(others)}; they belong together row by row."
        )


def fingerprint(*parts: Iterable[Any]) -> str:
    """SHA-256 over lists of values, so that two results can be known to be of the same data."""
    digest = hashlib.sha256()
    for part in parts:
        for value in part:
            digest.update(f"{value!r}\n".encode("utf-8", "surrogatepass"))
        digest.update(b"\0")
    return digest.hexdigest()
