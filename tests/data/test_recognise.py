"""Roles of columns: by their names, else a guess that says it is one."""

from typing import Any

import pytest

from embtune.data.recognise import recognise_columns
from embtune.errors import DataError

LONG = "a text of several words, long enough to be what is found"


@pytest.mark.parametrize(
    ("row", "roles", "unused"),
    [
        ({"query": "q", "answer": LONG}, {"query": "anchor", "answer": "positive"}, ()),
        ({"id": 7, "Question": "q", "pos": LONG}, {"Question": "anchor", "pos": "positive"}, ("id",)),
        ({"premise": "p", "hypothesis": "h", "score": "0.5"}, {"premise": "sentence1", "hypothesis": "sentence2"}, ()),
        ({"text": "t", "label": 1}, {"text": "text", "label": "label"}, ()),
        ({"anchor": "a", "positive": "p", "label": "sports"}, {"anchor": "anchor", "positive": "positive"}, ("label",)),
    ],
    ids=str,
)
def test_names_that_tell_the_roles(row: dict[str, Any], roles: dict[str, str], unused: tuple[str, ...]) -> None:
    found = recognise_columns([row], "rows.csv")
    assert found.roles.items() >= roles.items()
    assert found.unused == unused
    assert not found.guessed


@pytest.mark.parametrize(
    ("row", "roles"),
    [
        ({"frage": "kurz", "antwort": LONG}, {"frage": "anchor", "antwort": "positive"}),
        ({"antwort": LONG, "frage": "kurz", "nr": "12", "n": 3}, {"frage": "anchor", "antwort": "positive"}),
        ({"title": "t", "question": "Which?", "body": LONG}, {"question": "anchor", "body": "positive"}),
        ({"answer": "yes", "what": LONG, "x": "y"}, {"what": "anchor", "answer": "positive"}),
        ({"Answer Text": "a", "Question-Text": LONG}, {"Question-Text": "anchor", "Answer Text": "positive"}),
        ({"q": "short", "pos": LONG, "neg": LONG}, {"q": "anchor", "pos": "positive"}),
        ({"question": "q", "text": LONG}, {"question": "anchor", "text": "positive"}),
        ({"left": LONG, "right": "r", "score": 0.5}, {"left": "sentence1", "right": "sentence2", "score": "score"}),
        ({"body": LONG, "label": "3"}, {"body": "text", "label": "label"}),
        ({"anchor": "a", "positive": "p", "negative": "n", "score": 1.0, "x": 2}, None),
    ],
    ids=str,
)
def test_guesses_say_so(row: dict[str, Any], roles: dict[str, str] | None) -> None:
    found = recognise_columns([row, row], "rows.csv")
    if roles is None:  # a label beside three texts could mean several things, so it is left out, and seen
        assert list(found.roles.values()) == ["anchor", "positive", "negative"]
        assert found.unused == ("score", "x")
        assert not found.guessed
        return
    assert found.roles == roles
    assert found.guessed
    assert set(found.unused) == row.keys() - roles.keys()


@pytest.mark.parametrize("row", [{"text": "alone"}, {"a": 1, "b": 2}, {"a": "1", "b": "2", "c": LONG}, {}], ids=str)
def test_too_few_texts(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"rows.csv: training needs two columns of text, or one and a label"):
        recognise_columns([row], "rows.csv")
    with pytest.raises(DataError, match="holds no rows"):
        recognise_columns([], "rows.csv")
