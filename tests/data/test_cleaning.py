"""What a check finds, and what is left when it is taken out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from embtune.data.cleaning import CheckedData, LengthLimit, check_data
from embtune.data.readers import RawRows, read_raw
from embtune.data.scripts import main_script
from embtune.errors import ArgumentError, DataError

CLEAN = [
    {"anchor": "What is a file?", "positive": "A named run of bytes that the disk keeps for later."},
    {"anchor": "What is a thread?", "positive": "One of several flows of control within a process."},
    {"anchor": "What is a matrix?", "positive": "Numbers in rows and columns, as linear maps need them."},
]


def raw(*rows: Mapping[str, Any]) -> RawRows:
    return RawRows(Path("pairs.jsonl"), "line", enumerate(map(dict, rows), 1))


def check(*rows: Mapping[str, Any], **options: Any) -> CheckedData:
    return check_data(raw(*rows), **options)


def only_finding(checked: CheckedData) -> str:
    [finding] = checked.findings
    return finding.text


def kept(checked: CheckedData) -> list[str]:
    return list(checked.cleaned()["anchor"])


def test_clean_data_has_no_findings() -> None:
    checked = check(*CLEAN)
    assert checked.findings == ()
    assert list(checked.cleaned()) == CLEAN
    assert [(facts.name, facts.role, facts.script) for facts in checked.columns] == [
        ("anchor", "anchor", "Latin"),
        ("positive", "positive", "Latin"),
    ]


def test_rows_that_cannot_be_used() -> None:
    broken = [
        {"anchor": "", "positive": "x"},
        {"anchor": "y", "positive": None},
        {"anchor": 3, "positive": "x"},
        {"anchor": "z"},
        {"anchor": "z", "positive": "w", "title": "extra"},
    ]
    checked = check(CLEAN[0], *broken, *CLEAN[1:])
    text = only_finding(checked)
    assert "5 of 8 (line 2, column 'anchor' is an empty text" in text
    assert "line 3, column 'positive' is empty (null)" in text
    assert "line 4, column 'anchor' is the number 3" in text
    assert list(checked.cleaned()) == CLEAN
    with_mapping = check(CLEAN[0], broken[-1], columns={"anchor": "anchor", "positive": "positive"})
    assert with_mapping.findings == ()


def test_labels_that_cannot_be_used() -> None:
    rows = [{"sentence1": f"a{n}", "sentence2": f"b{n}", "score": n / 4} for n in range(3)]
    checked = check(*rows, {**rows[0], "score": "high"}, {**rows[0], "score": [1.0]})
    text = only_finding(checked)
    assert "2 of 5 (line 4, column 'score' is 'high' where a finite number belongs" in text
    assert "line 5, column 'score' is a list of 1 numbers" in text
    assert list(checked.cleaned()) == rows


def test_nothing_usable_and_nothing_at_all() -> None:
    checked = check({"anchor": "", "positive": ""})
    assert checked.rows is None
    assert "Rows that cannot be used: 1 of 1" in only_finding(checked)
    with pytest.raises(DataError, match="No row is left"):
        checked.cleaned()
    with pytest.raises(DataError, match="holds no rows"):
        check()
    with pytest.raises(DataError, match="role of column 'frage', 'antwort'"):
        check({"frage": "a", "antwort": "b"})


def test_repeated_rows() -> None:
    other_case = {name: text.upper().replace(" ", "  ") for name, text in CLEAN[0].items()}
    checked = check(*CLEAN, CLEAN[1], other_case)
    assert "Rows that repeat an earlier row: 2 of 5, 40.0% (lines 4, 5)" in only_finding(checked)
    assert list(checked.cleaned()) == CLEAN


def test_nearly_repeated_rows_in_every_column_at_once() -> None:
    near = {"anchor": "What is - a file", "positive": "A named run of bytes that a disk keeps for later"}
    same_answer = {"anchor": "Where do bytes go?", "positive": CLEAN[0]["positive"]}
    same_question = {"anchor": CLEAN[0]["anchor"], "positive": "Something quite different."}
    checked = check(*CLEAN, near, same_answer, same_question)
    text = only_finding(checked)
    assert "nearly repeat an earlier row (80% of the words in every column), as 4 does 1: 1 of 6" in text
    assert list(checked.cleaned()) == [*CLEAN, same_answer, same_question]
    assert check(*CLEAN, near, near_duplicates=1.0).findings == ()
    with pytest.raises(ArgumentError, match="near_duplicates=1.5"):
        check(*CLEAN, near_duplicates=1.5)


def test_labels_that_contradict_each_other() -> None:
    rows = [{"sentence1": "one", "sentence2": "two", "score": score} for score in (1, 0, 1)]
    rows += [{"sentence1": "three", "sentence2": "four", "score": 1}]
    checked = check(*rows)
    assert "have the texts of another, but not its score: 3 of 4" in checked.findings[-1].text
    assert list(checked.cleaned()["sentence1"]) == ["three"]
    # Their words are nearly the same and their labels are not: that may be the very point of the data.
    assert check({**rows[0], "sentence1": "not one"}, {**rows[1], "sentence1": "one not"}).findings == ()


def test_rows_that_teach_the_wrong_thing() -> None:
    same = {"anchor": "Echo!", "positive": "echo!", "negative": "silence"}
    rows = [{**row, "negative": "nothing of the kind"} for row in CLEAN]
    second_answer = {"anchor": "what is a FILE?", "positive": "A folder's entry.", "negative": CLEAN[0]["positive"]}
    checked = check(*rows, same, second_answer)
    texts = [finding.text for finding in checked.findings]
    assert "have one text as anchor and positive: 1 of 5, 20.0% (line 4)" in texts[0]
    assert "have as negative what is a positive of the same anchor: 1 of 5, 20.0% (line 5)" in texts[1]
    assert list(checked.cleaned()) == rows


def test_texts_that_are_measured_with() -> None:
    asked = ["WHAT is a  file?", "a process, what is it?"]
    rows = [*CLEAN, {"anchor": "process: what is it, a", "positive": "A program that runs."}]
    checked = check(*rows, evaluation={"dev.jsonl": asked})
    exact, near = (finding.text for finding in checked.findings)
    assert "have as anchor a text that dev.jsonl measures with: 1 of 4, 25.0% (line 1)" in exact
    assert "as 'process: what is it, a' and 'a process, what is it?': 1 of 4, 25.0% (line 4)" in near
    assert list(checked.cleaned()) == CLEAN[1:]


def test_long_texts_are_shown_and_stay() -> None:
    words = LengthLimit(10, "words", lambda texts: (len(text.split()) for text in texts))
    checked = check(*CLEAN, lengths=words)
    assert "have as positive a text of more than 10 words: 1 of 3, 33.3% (line 1)" in only_finding(checked)
    assert len(checked.cleaned()) == 3
    long = {"anchor": "What is long?", "positive": "word " * 500}
    assert "more than 2,000 characters (about 512 tokens" in only_finding(check(*CLEAN, long))


def test_columns_that_look_swapped() -> None:
    questions = [{"anchor": row["positive"], "positive": f"Tell me, {row['anchor']}"} for row in CLEAN]
    assert "most positives end in a question mark" in only_finding(check(*questions))
    lengths = [{"anchor": "word" + " and word" * 9 + str(n), "positive": f"w{n}"} for n in range(3)]
    checked = check(*lengths, near_duplicates=1.0)
    assert "anchors have 86 characters on average and positives 2" in only_finding(checked)
    assert len(checked.cleaned()) == 3


def test_other_scripts() -> None:
    russian = {"anchor": "Что такое очередь?", "positive": "Список, который обслуживают по порядку, like a queue."}
    numbers = {"anchor": "1 + 1 = ?", "positive": "2"}
    checked = check(*CLEAN, russian, numbers)
    texts = [finding.text for finding in checked.findings]
    assert len(texts) == 2
    assert "have as anchor a text in another script than Latin, that of most: 1 of 5, 20.0% (line 4)" in texts[0]
    assert len(checked.cleaned()) == 5


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Grüße aus Köln", "Latin"),
        ("print('x')", "Latin"),
        ("日本語のカタカナ文", "Han"),
        ("Привет, world", "Cyrillic"),
        ("안녕하세요", "Hangul"),
        ("ＡＢＣ", "Latin"),
        ("3 + 4 = 7 🙂", None),
        ("१२ हिन्दी", "Devanagari"),
    ],
)
def test_script_of_a_text(text: str, script: str | None) -> None:
    assert main_script(text) == script


def test_checking_what_was_cleaned_finds_nothing_more_to_remove(tmp_path: Path) -> None:
    rows = [{"anchor": f"how to {verb} {noun}", "positive": f"{verb} {noun}"} for verb in "abc" for noun in "xyz"]
    rows += [*rows[:3], {"anchor": "how to a x", "positive": "x a"}, {"anchor": " ", "positive": "b"}, rows[0], *CLEAN]
    rows += [{"anchor": "to x how a", "positive": "a, x"}, {"anchor": "same", "positive": "same"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options: dict[str, Any] = {"evaluation": {"dev": ["how to b y", "how to c"]}}
    first = check_data(read_raw(path), **options)
    assert sum(finding.removable for finding in first.findings) >= 5
    path.write_text("\n".join(json.dumps(row) for row in first.cleaned()), encoding="utf-8")
    second = check_data(read_raw(path), **options)
    assert not any(finding.removable for finding in second.findings)
    assert second.total == len(first.cleaned())
