from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from embtune.data.retrieval import RetrievalData
from embtune.evaluate import compare, evaluate_clustering, evaluate_retrieval, evaluate_sts
from embtune.report.evidence import HITS, PAIRS, QUERIES, TEXT, Evidence, Sample
from embtune.report.lengths import measure_lengths


@pytest.fixture(scope="module")
def models(tiny_dir: Callable[..., Path]) -> tuple[SentenceTransformer, SentenceTransformer]:
    """Two different models, as before and after training."""
    return tuple(SentenceTransformer(str(tiny_dir(name)), device="cpu") for name in ("bert", "mpnet"))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    """200 queries; every second one has two right documents, of grades 1 and 2."""
    queries = {f"q{n}": f"how to read row {n} of table {n % 7}" for n in range(200)}
    corpus = {
        f"d{n}": f"row {n} of table {n % 7} is read so: {n}" + " and on" * (n % 50 // 49 * 60) for n in range(300)
    }
    relevant = {f"q{n}": {f"d{n}": 1, f"d{n + 100}": 2} if n % 2 else {f"d{n}": 1} for n in range(200)}
    return RetrievalData(queries, corpus, relevant)


@pytest.fixture(scope="module")
def comparison(models: tuple[SentenceTransformer, SentenceTransformer], data: RetrievalData) -> dict:
    before, after = (evaluate_retrieval(model, data) for model in models)
    evidence = Evidence("data", data)
    evidence.see_before(models[0], before)
    return evidence.compared(models[1], after, compare(before, after))


def test_what_is_kept_is_bounded(comparison: dict, data: RetrievalData) -> None:
    assert comparison["items"] == 200
    assert len(comparison["queries"]) == QUERIES < 200
    assert len(comparison["scores"]["before"]) == 200
    assert max(len(document["text"]) for document in comparison["documents"]) == TEXT
    assert len(comparison["map"]["queries"]) == PAIRS
    for query in comparison["queries"]:
        assert query["text"] == data.queries[query["id"]]
        for side in ("before", "after"):
            assert len(query[side]["hits"]) == HITS
            for number, _, right in query[side]["hits"]:
                document = comparison["documents"][number]
                assert data.corpus[document["id"]].startswith(document["text"].removesuffix("…"))
                assert right == (document["id"] in data.relevant[query["id"]])


def test_the_queries_that_are_kept_changed_the_most(comparison: dict) -> None:
    changes = [query["after"]["score"] - query["before"]["score"] for query in comparison["queries"]]
    assert changes == sorted(changes)
    every = np.sort(np.array(comparison["scores"]["after"]) - np.array(comparison["scores"]["before"]))
    worse = sum(change < 0 for change in changes)
    assert changes[:worse] == pytest.approx(every[:worse].tolist(), abs=2e-4)
    assert changes[-3:] == pytest.approx(every[-3:].tolist(), abs=2e-4)


def test_similarities_are_those_of_the_pairs(
    comparison: dict, models: tuple[SentenceTransformer, SentenceTransformer], data: RetrievalData
) -> None:
    sample = Sample.of(data)
    for side, model in zip(("before", "after"), models, strict=True):
        found = comparison["similarity"][side]
        queries = model.encode(list(sample.queries.values()), convert_to_tensor=True)
        right = model.similarity_pairwise(
            queries, model.encode(list(sample.documents.values()), convert_to_tensor=True)
        )
        expected = np.histogram(right.numpy(), comparison["similarity"]["edges"])[0]
        # The edges are rounded; a pair that lies on one may be counted beside it.
        assert np.abs(np.cumsum(expected) - np.cumsum(found["right"]["counts"])).max() <= 2
        assert found["right"]["mean"] == pytest.approx(float(right.mean()), abs=1e-5)
        assert found["unrelated"]["counts"].sum() == sample.unrelated.sum()
    query = next(name for name in sample.queries if len(data.relevant[name]) == 2)
    assert sample.documents[query] == data.corpus[f"d{int(query[1:]) + 100}"]


def test_both_maps_lie_in_one_plane(
    comparison: dict, models: tuple[SentenceTransformer, SentenceTransformer], data: RetrievalData
) -> None:
    sample = Sample.of(data)
    points = np.concatenate([sample.embed(model).reshape(2 * PAIRS, -1) for model in models])
    points -= points.mean(axis=0)
    shown = np.concatenate(
        [comparison["map"][side][kind] for side in ("before", "after") for kind in ("queries", "documents")]
    )
    # A projection on orthogonal directions: linear, and no distance grows.
    axes, *_ = np.linalg.lstsq(points, shown, rcond=None)
    assert np.abs(points @ axes - shown).max() < 1e-3
    assert comparison["map"]["variance"] == pytest.approx((shown**2).sum() / (points**2).sum(), rel=1e-3)


def test_the_forgetting_check_has_queries_and_no_map(
    models: tuple[SentenceTransformer, SentenceTransformer], data: RetrievalData
) -> None:
    result = evaluate_retrieval(models[0], data)
    evidence = Evidence("prose", data, "forgetting")
    evidence.see_before(models[0], result)
    fields = evidence.compared(models[0], result, compare(result, result))
    assert fields["role"] == "forgetting"
    assert fields["queries"][0]["before"]["hits"]
    assert "map" not in fields
    assert "similarity" not in fields
    assert fields["counts"] == {"better": 0, "worse": 0, "unchanged": 200}


def test_other_kinds_of_evaluation(models: tuple[SentenceTransformer, SentenceTransformer]) -> None:
    texts = [f"text {n} of table {n % 3}" for n in range(12)]
    results = [
        [evaluate_sts(model, texts, texts[::-1], [n / 12 for n in range(12)]) for model in models],
        [evaluate_clustering(model, texts, [n % 3 for n in range(12)]) for model in models],
    ]
    for before, after in results:
        evidence = Evidence("other", None)
        evidence.see_before(models[0], before)
        fields = evidence.compared(models[1], after, compare(before, after))
        assert fields["kind"] == before.kind
        assert ("queries" in fields) == (before.by_item() is not None)
        assert "documents" not in fields


def test_lengths_and_padding(models: tuple[SentenceTransformer, SentenceTransformer]) -> None:
    model = models[0]
    rows = Dataset.from_dict(
        {"anchor": ["a text"] * 30, "positive": ["word " * (1 + n % 10) for n in range(30)], "label": [1] * 30}
    )
    found = measure_lengths(model, {"one": rows, "two": rows}, batch_size=30)
    assert found is not None
    assert list(found["columns"]) == ["anchor", "positive"]
    assert found["rows"] == 60
    counted = [len(model.tokenizer(text)["input_ids"]) for column in ("anchor", "positive") for text in rows[column]]
    assert found["tokens_per_row"] == pytest.approx(sum(counted) / 30)
    padded = 30 * max(counted[:30]) + 30 * max(counted[30:])
    assert found["padding"] == pytest.approx(1 - sum(counted) / padded)
    for column in found["columns"].values():
        assert column["counts"].sum() == 60
    assert found["truncated"] == 0
    assert found["packed"] is False
    longer = measure_lengths(model, {"one": rows}, batch_size=30, prompts={"anchor": "query: "})
    assert longer is not None
    assert longer["columns"]["anchor"]["mean"] > found["columns"]["anchor"]["mean"]
