"""Findings about rows that are each in order."""

import pytest
from datasets import Dataset

from embtune.data.checks import check_training_data
from embtune.data.retrieval import RetrievalData
from embtune.errors import DataError, EmbtuneWarning


def pairs(*rows: tuple[str, str]) -> Dataset:
    return Dataset.from_list([{"anchor": anchor, "positive": positive} for anchor, positive in rows])


def findings(train: Dataset, evaluation: Dataset | RetrievalData | None = None) -> list[str]:
    with pytest.warns(EmbtuneWarning) as caught:
        returned = check_training_data(train, evaluation)
    assert returned == [str(warning.message) for warning in caught]
    assert all(warning.filename == __file__ for warning in caught)
    return returned


CLEAN = pairs(("a", "1"), ("b", "2"), ("c", "3"))


def test_clean_data_has_no_findings() -> None:
    assert check_training_data(CLEAN, pairs(("d", "4")), batch_size=3) == []


def test_fewer_rows_than_a_batch() -> None:
    with pytest.raises(DataError, match=r"3 rows, but a batch holds 4.*at most 3"):
        check_training_data(CLEAN, batch_size=4)


def test_cells_that_are_no_text() -> None:
    with pytest.raises(DataError, match=r"the training data, row 2 \(dataset\[1\]\), column 'anchor' is empty"):
        check_training_data(Dataset.from_dict({"query": ["a", None], "answer": ["b", "c"]}))
    with pytest.raises(DataError, match=r"the evaluation data, row 1 .*column 'positive' is the number 3"):
        check_training_data(CLEAN, Dataset.from_dict({"query": ["a"], "answer": [3]}))


def test_several_data_sets_are_checked_by_name() -> None:
    twice, same = pairs(("a", "1"), ("a", "1")), pairs(("x", "x"), ("y", "z"))
    stream = CLEAN.to_iterable_dataset()
    evaluation = {"seen": pairs(("A", "7"), ("new", "8")), "unseen": pairs(("other", "9"))}
    with pytest.warns(EmbtuneWarning) as caught:
        found = check_training_data({"twice": twice, "same": same, "stream": stream}, evaluation, batch_size=9)
    assert found == [str(warning.message) for warning in caught]
    assert [text[:53] for text in found] == [
        "1 of 2 training rows 'twice' repeat an earlier row (r",
        "In 1 of 2 training rows 'same' anchor and positive ar",
        "1 of 2 evaluation rows 'seen' have as anchor a text t",
    ]
    with pytest.raises(DataError, match="longest of the training data sets has 3 rows, but a batch holds 4"):
        check_training_data({"one": CLEAN, "other": same}, batch_size=4)
    assert check_training_data({"one": CLEAN, "other": pairs(("y", "z"))}, batch_size=3) == []
    with pytest.raises(DataError, match=r"the training data 'bad', row 2 \(dataset\[1\]\), column 'anchor' is empty"):
        check_training_data({"one": CLEAN, "bad": Dataset.from_dict({"query": ["a", None], "answer": ["b", "c"]})})
    with pytest.raises(DataError, match="the evaluation data 'bad', row 1"):
        check_training_data(CLEAN, {"bad": Dataset.from_dict({"query": ["a"], "answer": [3]})})


def test_duplicate_rows() -> None:
    (finding,) = findings(pairs(("a", "1"), ("b", "2"), ("a", "1"), ("a", "3"), ("a", "1")))
    assert "2 of 5 training rows" in finding
    assert "row 3 is row 1, row 5 is row 1" in finding
    assert "its own negative" in finding
    labelled = Dataset.from_dict({"text": ["a", "a", "a"], "label": [0, 1, 0]})
    (finding,) = findings(labelled)
    assert "1 of 3" in finding
    assert "row 3 is row 1" in finding
    assert "negative" not in finding


def test_many_duplicates_are_counted_but_few_are_shown() -> None:
    (finding,) = findings(pairs(*[("a", "1")] * 2_500))
    assert "2499 of 2500" in finding
    assert finding.count("is row 1") == 3


def test_pairs_that_teach_nothing() -> None:
    data = Dataset.from_dict(
        {"query": ["Same  Text", "b"], "answer": ["same text", "c"], "neg": ["x", "y"], "neg2": ["x", " C "]}
    )
    anchor, negative = findings(data)
    assert "1 of 2" in anchor
    assert "anchor and positive are the same text (row 1)" in anchor
    assert "positive and negative_2 are the same text (row 2)" in negative


@pytest.mark.parametrize(
    "evaluation_text", ["How  do I\nsort?", "HOW DO I SORT?", "Ｈow do I sort?", " How do I sort? "]
)
def test_evaluation_texts_seen_in_training(evaluation_text: str) -> None:
    train = pairs(("How do I sort?", "sorted(x)"), ("b", "2"))
    (finding,) = findings(train, pairs(("new", "4"), (evaluation_text, "5")))
    assert "1 of 2 evaluation rows have as anchor" in finding
    assert "row 2" in finding
    assert repr(evaluation_text) in finding
    queries = RetrievalData({"x": "new", "y": evaluation_text}, {"d": "sorted(x)"}, {"x": {"d"}, "y": {"d"}})
    (finding,) = findings(train, queries)
    assert "1 of 2 evaluation rows have as query" in finding
    assert check_training_data(train, pairs(("How do I sort", "x"))) == []


def test_long_texts_are_shortened() -> None:
    (finding,) = findings(pairs(("a" * 500, "1")), pairs(("a" * 500, "9")))
    assert "a" * 59 + "…" in finding
    assert "a" * 60 not in finding
