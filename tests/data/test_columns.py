"""Roles of columns by name and by mapping, on data sets and streams."""

import random

import pytest
from datasets import Dataset

from embtune.data.columns import ALIASES, ColumnRoles, canonical, role_of
from embtune.errors import ArgumentError, DataError


@pytest.mark.parametrize(
    ("column", "role"),
    [
        ("anchor", "anchor"),
        ("Query", "anchor"),
        (" Question ", "anchor"),
        ("Search-Query", "anchor"),
        ("ANSWER", "positive"),
        ("passage", "positive"),
        ("hard negative", "negative"),
        ("neg", "negative"),
        ("neg3", "negative_3"),
        ("Negative_12", "negative_12"),
        ("hard_negative_02", "negative_2"),
        ("sentence_A", "sentence1"),
        ("Text2", "sentence2"),
        ("similarity", "score"),
        ("Labels", "labels"),
        ("text", "text"),
        ("id", None),
        ("context", None),
        ("negatives", None),
        ("negative_", None),
        ("", None),
    ],
)
def test_a_name_says_its_role(column: str, role: str | None) -> None:
    assert role_of(column) == role


def test_every_role_is_its_own_alias() -> None:
    assert all(role_of(role) == role for role in ALIASES.values())


def test_order_never_matters() -> None:
    names = ["Query", "answer", "neg_2", "hard_negative_1", "neg10", "label"]
    expected = ["anchor", "positive", "negative_1", "negative_2", "negative_10", "label"]
    generator = random.Random(0)
    for _ in range(50):
        generator.shuffle(names)
        roles = ColumnRoles.from_names(names)
        assert list(roles.roles) == expected
        assert roles.columns == ("Query", "answer", "hard_negative_1", "neg_2", "neg10", "label")
    assert roles.label == "label"
    assert list(roles.texts.values()) == expected[:-1]


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        (["score", "sentence2", "sentence1"], ("sentence1", "sentence2", "score")),
        (["label", "text"], ("text", "label")),
        (["sentence"], ("sentence",)),
        (["negative_1", "negative", "positive", "anchor"], ("anchor", "positive", "negative", "negative_1")),
    ],
)
def test_layouts(names: list[str], roles: tuple[str, ...]) -> None:
    assert ColumnRoles.from_names(names).roles == roles


@pytest.mark.parametrize(
    ("names", "fragments"),
    [
        (["query", "question", "answer"], ["'query' and 'question'", "'anchor'", "Remove one", "--columns "]),
        (["text", "label", "score"], ["'label' and 'score'", "Remove one"]),
        (["anchor", "positive", "neg_1", "negative1"], ["'neg_1' and 'negative1'", "negative_1"]),
        (["id", "prompt", "code"], ["'id', 'prompt', 'code'", "not known", "--columns "]),
        (["id", "question", "answer"], ["'id'", "--columns question=anchor answer=positive"]),
        (["query", "code"], ["'code'", "--columns query=anchor code=positive"]),
        (["query", "text"], ["do not belong together", "text=positive"]),
        (["anchor", "negative"], ["'positive'", "Rename it, or say which it is"]),
        (["anchor", "label"], ["'positive'", "'text'"]),
        (["sentence1", "score"], ["'sentence2'", "Rename it, or say which it is"]),
        (["label"], ["no text column", "'label'"]),
        ([], ["no text column"]),
        (["anchor", "positive", "anchor"], ["'anchor'", "twice", "Rename"]),
    ],
)
def test_names_that_are_not_clear_are_refused(names: list[str], fragments: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        ColumnRoles.from_names(names, source="pairs.csv, line 1")
    assert "pairs.csv, line 1" in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_the_mapping_in_a_message_works() -> None:
    names = ["id", "prompt", "code", "lang"]
    with pytest.raises(DataError) as caught:
        ColumnRoles.from_names(names[1:])
    assert "--columns prompt=anchor code=positive" in str(caught.value)
    roles = ColumnRoles.from_names(names, {"prompt": "anchor", "code": "positive"})
    assert dict(roles) == {"prompt": "anchor", "code": "positive"}


def test_a_mapping_is_checked() -> None:
    with pytest.raises(DataError, match=r"promt=anchor.*'prompt', 'code'.*spelt"):
        ColumnRoles.from_names(["prompt", "code"], {"promt": "anchor", "code": "positive"})
    with pytest.raises(ArgumentError, match=r"no role 'query'.*anchor, positive"):
        ColumnRoles.from_names(["prompt", "code"], {"prompt": "query", "code": "positive"})
    with pytest.raises(ArgumentError, match="columns is empty: it chooses no column of 'prompt', 'code'"):
        ColumnRoles.from_names(["prompt", "code"], {})
    with pytest.raises(DataError, match="'a' and 'b' both claim the role 'anchor'"):
        ColumnRoles.from_names(["a", "b"], {"a": "anchor", "b": "anchor"})


def test_canonical_selects_renames_and_reorders() -> None:
    dataset = Dataset.from_dict({"id": [1, 2], "code": ["a", "b"], "gain": [0.5, 1.0], "prompt": ["p", "q"]})
    mapping = {"code": "positive", "prompt": "anchor", "gain": "score"}
    result = canonical(dataset, mapping)
    assert result.column_names == ["anchor", "positive", "score"]
    assert result[0] == {"anchor": "p", "positive": "a", "score": 0.5}
    stream = canonical(dataset.to_iterable_dataset(), mapping)
    assert stream.column_names == ["anchor", "positive", "score"]
    assert [list(row.items()) for row in stream] == [list(row.items()) for row in result]


def test_canonical_can_swap_names() -> None:
    dataset = Dataset.from_dict({"anchor": ["document"], "positive": ["query"], "extra": ["x"]})
    mapping = {"positive": "anchor", "anchor": "positive"}
    for data in dataset, dataset.to_iterable_dataset():
        row = next(iter(canonical(data, mapping)))
        assert list(row.items()) == [("anchor", "query"), ("positive", "document")]


def test_canonical_leaves_canonical_data_alone() -> None:
    dataset = Dataset.from_dict({"anchor": ["a"], "positive": ["b"], "label": [1]})
    assert canonical(dataset) is dataset
    stream = dataset.to_iterable_dataset()
    assert canonical(stream) is stream


def test_a_stream_without_columns_is_refused() -> None:
    stream = Dataset.from_dict({"anchor": ["a"], "positive": ["b"]}).to_iterable_dataset().map(lambda row: row)
    assert stream.column_names is None
    with pytest.raises(DataError, match=r"the evaluation stream: .*features"):
        canonical(stream, source="the evaluation stream")
