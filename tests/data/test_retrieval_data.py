"""Retrieval data from BEIR folders and from pairs."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from embtune.data.retrieval import RetrievalData
from embtune.errors import DataError, EmbtuneWarning

CORPUS = (
    '{"_id": "d1", "title": "Title", "text": "one", "metadata": {}}\n'
    '{"_id": "d2", "title": "", "text": "two"}\n{"_id": "d3", "text": "three"}\n'
)
QUERIES = '{"_id": "q1", "text": "first"}\n{"_id": "q2", "text": "second"}\n{"_id": "q3", "text": "other split"}\n'
HEADER = "query-id\tcorpus-id\tscore\n"
QRELS = HEADER + "q1\td1\t2\nq1\td2\t0\nq2\td3\t1\r\nq2\td1\t-1\n"


def beir(folder: Path, corpus: str = CORPUS, queries: str = QUERIES, qrels: str = QRELS, split: str = "test") -> Path:
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "corpus.jsonl").write_text(corpus)
    (folder / "queries.jsonl").write_text(queries)
    (folder / "qrels" / f"{split}.tsv").write_bytes(qrels.encode())
    return folder


def test_from_beir(tmp_path: Path) -> None:
    data = RetrievalData.from_beir(beir(tmp_path))
    assert data.queries == {"q1": "first", "q2": "second"}
    assert data.corpus == {"d1": "Title one", "d2": "two", "d3": "three"}
    assert data.relevant == {"q1": {"d1": 2}, "q2": {"d3": 1}}
    beir(tmp_path, qrels=HEADER + "q3\td2\t1\n\n", split="dev")
    assert RetrievalData.from_beir(str(tmp_path), split="dev").queries == {"q3": "other split"}


def test_oddities_of_published_sets_are_accepted_with_a_warning(tmp_path: Path) -> None:
    beir(tmp_path, corpus=CORPUS + '{"_id": "d4", "title": "", "text": " "}\n')
    with pytest.warns(EmbtuneWarning, match=r"corpus\.jsonl: 1 documents have neither.*line 4"):
        data = RetrievalData.from_beir(tmp_path)
    assert data.corpus["d4"] == ""
    beir(tmp_path, qrels=QRELS + "q3\td1\t0\nq1\td1\t2\n")
    with pytest.warns(EmbtuneWarning, match=r"test\.tsv: 1 queries have no document.*'q3'"):
        data = RetrievalData.from_beir(tmp_path)
    assert set(data.queries) == {"q1", "q2"}


BROKEN = [
    ("corpus", '{"_id": "d1", "text": "x"\n', ["corpus.jsonl, line 1", "broken JSON"]),
    ("corpus", CORPUS + '{"_id": "d1", "text": "x"}\n', ["corpus.jsonl, line 4", "'d1'", "line 1", "must differ"]),
    ("corpus", CORPUS + '{"id": "d4", "text": "x"}\n', ["corpus.jsonl, line 4", "'_id' is missing", "'id', 'text'"]),
    ("corpus", CORPUS + '{"_id": 4, "text": "x"}\n', ["corpus.jsonl, line 4", "'_id'", "number 4", 'as "4"']),
    ("corpus", CORPUS + '{"_id": "d4", "title": "x"}\n', ["corpus.jsonl, line 4", "'text' is missing"]),
    ("corpus", CORPUS + '{"_id": "d4", "text": null}\n', ["corpus.jsonl, line 4", "'text'", "null"]),
    ("corpus", CORPUS + '{"_id": "d4", "title": 1, "text": "x"}\n', ["corpus.jsonl, line 4", "'title'", "number 1"]),
    ("corpus", CORPUS + '["d4", "x"]\n', ["corpus.jsonl, line 4", "type list", "object"]),
    ("corpus", "", ["corpus.jsonl", "no rows"]),
    ("queries", "", ["queries.jsonl", "no rows"]),
    ("queries", '{"_id": "q1", "text": " "}\n', ["queries.jsonl, line 1", "'text'", "empty text", "remove the row"]),
    ("queries", '{"_id": "", "text": "x"}\n', ["queries.jsonl, line 1", "'_id'", "empty text"]),
    ("qrels", "", ["test.tsv", "no judgements"]),
    ("qrels", HEADER, ["test.tsv", "no judgements"]),
    ("qrels", "q1\td1\t1\n", ["test.tsv, line 1", "header", "on top"]),
    ("qrels", "query-id corpus-id score\nq1 d1 1\n", ["test.tsv, line 1", "tabs"]),
    ("qrels", HEADER + "q1\td1\n", ["test.tsv, line 2", "2 cells", "between tabs"]),
    ("qrels", HEADER + "q1\t0\td1\t1\n", ["test.tsv, line 2", "4 cells"]),
    ("qrels", HEADER + "q1\td1\t0.5\n", ["test.tsv, line 2", "'score'", "'0.5'", "whole number"]),
    ("qrels", HEADER + "q1\td1\tyes\n", ["test.tsv, line 2", "'score'", "'yes'"]),
    ("qrels", HEADER + "q1\td1\t1\nq9\td1\t1\n", ["test.tsv, line 3", "query-id 'q9'", "queries.jsonl", "remove"]),
    ("qrels", HEADER + "q1\td9\t1\n", ["test.tsv, line 2", "corpus-id 'd9'", "corpus.jsonl", "remove"]),
    ("qrels", HEADER + "q1\td1\t1\nq1\td1\t2\n", ["test.tsv, line 3", "contradicts line 2", "Keep one"]),
]


@pytest.mark.parametrize(("file", "content", "fragments"), BROKEN)
def test_a_mistake_in_a_beir_folder(file: str, content: str, fragments: list[str], tmp_path: Path) -> None:
    beir(tmp_path, **{file: content})
    with pytest.raises(DataError) as caught:
        RetrievalData.from_beir(tmp_path)
    for fragment in [str(tmp_path), *fragments]:
        assert fragment in str(caught.value), str(caught.value)


@pytest.mark.parametrize("missing", ["corpus.jsonl", "queries.jsonl"])
def test_a_missing_file(missing: str, tmp_path: Path) -> None:
    (beir(tmp_path) / missing).unlink()
    with pytest.raises(DataError, match=rf"{missing} is missing.*corpus\.jsonl, queries\.jsonl and qrels"):
        RetrievalData.from_beir(tmp_path)


def test_a_missing_split_or_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dev\.tsv is missing\. The folder has qrels for split='test'"):
        RetrievalData.from_beir(beir(tmp_path), split="dev")
    with pytest.raises(DataError, match="nowhere: there is no such folder"):
        RetrievalData.from_beir(tmp_path / "nowhere")


def test_all_queries_without_relevant_documents(tmp_path: Path) -> None:
    beir(tmp_path, qrels=HEADER + "q1\td1\t0\n")
    with pytest.warns(EmbtuneWarning, match="cannot be scored"), pytest.raises(DataError, match="queries"):
        RetrievalData.from_beir(tmp_path)


def test_from_pairs() -> None:
    dataset = Dataset.from_dict(
        {"answer": ["1", "2", "1", "1"], "query": ["a", "a", "b", "a"], "negative": ["3", "4", "5", "6"]}
    )
    data = RetrievalData.from_pairs(dataset)
    assert data.queries == {"q0": "a", "q1": "b"}
    assert data.corpus == {"d0": "1", "d1": "2"}
    assert data.relevant == {"q0": {"d0", "d1"}, "q1": {"d0"}}


def test_from_pairs_refuses_what_has_no_pairs() -> None:
    with pytest.raises(DataError, match="anchor and positive, not sentence1, sentence2"):
        RetrievalData.from_pairs(Dataset.from_dict({"sentence1": ["a"], "sentence2": ["b"]}))
    with pytest.raises(DataError, match=r"'label' may say.*remove the column"):
        RetrievalData.from_pairs(Dataset.from_dict({"anchor": ["a"], "positive": ["b"], "label": [0]}))


@pytest.mark.parametrize(
    ("queries", "corpus", "relevant", "message"),
    [
        ({}, {"d": "x"}, {}, "0 and 1 given"),
        ({"q": "x"}, {}, {"q": {"d"}}, "1 and 0 given"),
        ({"q": "x"}, {"d": "x"}, {}, "'q' has no relevant document"),
        ({"q": "x"}, {"d": "x"}, {"q": set()}, "'q' has no relevant document"),
        ({"q": "x"}, {"d": "x"}, {"q": {"e"}}, "document 'e' is not in the corpus"),
        ({"q": "x"}, {"d": "x"}, {"q": {"d"}, "r": {"d"}}, "query 'r', which is not among"),
        ({"q": "x"}, {"d": "x"}, {"q": {"d": 0}}, "grade 0 is no whole number from 1"),
        ({"q": "x"}, {"d": "x"}, {"q": {"d": 1.5}}, "grade 1.5"),
    ],
)
def test_inconsistent_data_is_refused(queries: dict, corpus: dict, relevant: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        RetrievalData(queries, corpus, relevant)


def test_the_same_folder_as_written_by_json(tmp_path: Path) -> None:
    documents = {f"d{i}": f"Text {i} \u2028 \x85 with odd line ends" for i in range(50)}
    corpus = "".join(
        json.dumps({"_id": key, "text": text}, ensure_ascii=False) + "\n" for key, text in documents.items()
    )
    queries = "".join(json.dumps({"_id": f"q{i}", "text": f"query {i}"}) + "\n" for i in range(50))
    beir(tmp_path, corpus, queries, HEADER + "".join(f"q{i}\td{i}\t1\n" for i in range(50)))
    assert RetrievalData.from_beir(tmp_path).corpus == documents
