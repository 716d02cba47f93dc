from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sklearn.metrics import ndcg_score

from embtune.data import ranking as ranking_module
from embtune.data.retrieval import RetrievalData
from embtune.errors import ArgumentError, DataError, ModelError
from embtune.evaluate import RetrievalResult, evaluate_retrieval

THINGS = ["file", "socket", "thread", "list", "date", "matrix", "string", "password", "image", "process"]
ACTIONS = ["open", "close", "copy", "sort", "print", "compare"]


def task(graded: bool = False) -> RetrievalData:
    """60 short questions over 61 documents; one to four documents about the same thing are relevant."""
    names = [(action, thing) for thing in THINGS for action in ACTIONS]
    queries = {f"q{i}": f"how do I {action} a {thing}" for i, (action, thing) in enumerate(names)}
    corpus = {
        f"d{i}": f"def {action}_{thing}(value): return value.{action}()" for i, (action, thing) in enumerate(names)
    }
    relevant: dict[str, Any] = {}
    for i in range(len(names)):
        own = f"d{i - i % 6 + (i + i % 3) % 6}"  # not always the one that the words point to
        neighbours = {f"d{j}": 1 for j in range(i - i % 6, i - i % 6 + i % 4)}
        relevant[f"q{i}"] = {**neighbours, own: 3} if graded else {*neighbours, own}
    return RetrievalData(queries, {**corpus, "empty": ""}, relevant)


@pytest.fixture(scope="module")
def minilm(minilm_dir: Path) -> SentenceTransformer:
    return SentenceTransformer(str(minilm_dir), device="cpu")


@pytest.fixture(scope="module")
def tiny(tiny_dir: Callable[..., Path]) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_dir("bert")), device="cpu")


@pytest.fixture(scope="module")
def result(minilm: SentenceTransformer) -> RetrievalResult:
    return evaluate_retrieval(minilm, task())


@pytest.mark.parametrize("k", [1, 3, 10])
def test_means_equal_those_of_sentence_transformers(minilm: SentenceTransformer, k: int) -> None:
    data = task()
    evaluator = InformationRetrievalEvaluator(
        dict(data.queries),
        dict(data.corpus),
        {query: set(documents) for query, documents in data.relevant.items()},
        ndcg_at_k=[k],
        mrr_at_k=[k],
        precision_recall_at_k=[k],
        accuracy_at_k=[k],
        map_at_k=[k],
        write_csv=False,
    )
    theirs = evaluator(minilm)
    ours = evaluate_retrieval(minilm, data, k=k)
    assert 0.1 < ours.metrics[f"ndcg@{k}"] < 0.99
    for metric in ("ndcg", "mrr", "recall"):
        assert ours.metrics[f"{metric}@{k}"] == pytest.approx(theirs[f"cosine_{metric}@{k}"], abs=1e-9)
        assert getattr(ours, metric).mean() == pytest.approx(ours.metrics[f"{metric}@{k}"])


def test_graded_ndcg_has_linear_gain(minilm: SentenceTransformer) -> None:
    data = task(graded=True)
    result = evaluate_retrieval(minilm, data)
    queries = minilm.encode_query(list(data.queries.values()))
    similarities = minilm.similarity(queries, minilm.encode_document(list(data.corpus.values()))).numpy()
    grades = np.array([[data.relevant[query].get(doc, 0) for doc in data.corpus] for query in data.queries])
    expected = [ndcg_score(grades[i : i + 1], similarities[i : i + 1], k=10) for i in range(len(grades))]
    assert result.ndcg == pytest.approx(np.array(expected), abs=1e-6)
    assert not np.allclose(result.ndcg, evaluate_retrieval(minilm, task()).ndcg)


def test_result_keeps_what_was_found(minilm: SentenceTransformer, result: RetrievalResult) -> None:
    data = task()
    assert list(result.queries) == list(data.queries)
    assert result.items == len(result.ndcg) == len(result.mrr) == len(result.recall) == 60
    hits = result.top("q7", 10)
    assert len(hits) == 10
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    similarity = minilm.similarity(
        minilm.encode_query([data.queries["q7"]]), minilm.encode_document([data.corpus[hits[4].document_id]])
    )
    assert hits[4].score == pytest.approx(similarity.item(), abs=1e-6)
    ranks = [rank for rank, hit in enumerate(hits, 1) if hit.document_id in data.relevant["q7"]]
    assert result.mrr[7] == pytest.approx(1 / ranks[0])
    assert result.recall[7] == pytest.approx(len(ranks) / len(data.relevant["q7"]))
    assert result.top("q7", 2) == hits[:2]
    assert "ndcg@10" in str(result)


def test_k_above_ten_and_above_the_corpus_keeps_all_documents(tiny: SentenceTransformer) -> None:
    result = evaluate_retrieval(tiny, task(), k=100)
    assert len(result.top("q0", 100)) == 61
    assert result.metrics["recall@100"] == 1


@pytest.mark.parametrize("scores_per_block", [1, 2**24])
@pytest.mark.parametrize("chunk", [1, 7, 60])
def test_blocks_do_not_change_the_result(
    minilm: SentenceTransformer,
    result: RetrievalResult,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    scores_per_block: int,
) -> None:
    monkeypatch.setattr(ranking_module, "SCORES_PER_BLOCK", scores_per_block)
    blocked = evaluate_retrieval(minilm, task(), chunk=chunk)
    assert blocked.fingerprint == result.fingerprint
    assert np.array_equal(blocked.ndcg, result.ndcg)
    assert [hit.document_id for hit in blocked.top("q3")] == [hit.document_id for hit in result.top("q3")]


def test_corpus_is_never_encoded_or_scored_at_once(minilm_dir: Path) -> None:
    sizes: list[int] = []

    class Recording(SentenceTransformer):
        def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
            sizes.append(len(embeddings2))
            return super().similarity(embeddings1, embeddings2)

    evaluate_retrieval(Recording(str(minilm_dir), device="cpu"), task(), chunk=20)
    assert sizes == [20, 20, 20, 1]


def test_saved_prompts_apply(minilm_dir: Path, result: RetrievalResult) -> None:
    prompts = {"query": "password process image: ", "document": "matrix: "}
    model = SentenceTransformer(str(minilm_dir), device="cpu", prompts=prompts)
    with_prompts = evaluate_retrieval(model, task())
    data = task()
    by_hand = RetrievalData(
        {key: prompts["query"] + text for key, text in data.queries.items()},
        {key: prompts["document"] + text for key, text in data.corpus.items()},
        data.relevant,
    )
    plain = SentenceTransformer(str(minilm_dir), device="cpu")
    assert with_prompts.ndcg == pytest.approx(evaluate_retrieval(plain, by_hand).ndcg)
    assert not np.allclose(with_prompts.ndcg, result.ndcg)


@pytest.mark.parametrize("similarity", ["dot", "euclidean", "manhattan"])
def test_the_models_own_similarity_is_used(tiny_dir: Callable[..., Path], similarity: str) -> None:
    model = SentenceTransformer(str(tiny_dir("bert")), device="cpu", similarity_fn_name=similarity)
    del model[-1]  # Normalize would make them all rank alike
    data = task()
    hits = evaluate_retrieval(model, data).top("q5", 10)
    scores = model.similarity(
        model.encode_query([data.queries["q5"]]), model.encode_document(list(data.corpus.values()))
    )[0]
    assert [hit.score for hit in hits] == pytest.approx(scores.sort(descending=True).values[:10].tolist(), rel=1e-4)


def test_equal_scores_rank_by_id(tiny: SentenceTransformer) -> None:
    data = SimpleNamespace(
        queries={"q": "one"}, corpus=dict.fromkeys(["c", "a", "d", "b"], "the same text"), relevant={"q": {"b"}}
    )
    result = evaluate_retrieval(tiny, data)
    assert [hit.document_id for hit in result.top("q", 4)] == ["a", "b", "c", "d"]
    assert result.mrr.tolist() == [0.5]


def test_half_precision_is_scored_in_float32(tiny_dir: Callable[..., Path]) -> None:
    model = SentenceTransformer(str(tiny_dir("bert")), device="cpu", model_kwargs={"dtype": torch.bfloat16})
    similar = [hit.score for hit in evaluate_retrieval(model, task()).top("q0", 10)]
    assert any(score != torch.tensor(score).bfloat16().item() for score in similar)


def test_progress_is_shown_only_when_asked(tiny: SentenceTransformer, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_retrieval(tiny, task())
    assert capsys.readouterr() == ("", "")
    evaluate_retrieval(tiny, task(), show_progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Encoding" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": {}}, "queries"),
        ({"corpus": {}}, "documents"),
        ({"relevant": {"q": set()}}, "'q' has no relevant document"),
        ({"relevant": {"q": {"d"}, "p": {"d"}}}, "'p'"),
        ({"relevant": {"q": {"gone"}}}, "'gone' is not in the corpus"),
        ({"corpus": {"d": 5}}, "corpus has 'd': 5"),
        ({"queries": {"q": None}}, "queries has 'q': None"),
        ({"queries": {1: "one"}, "relevant": {1: {"d"}}}, "queries has 1"),
    ],
)
def test_wrong_data_is_refused(tiny: SentenceTransformer, change: dict[str, Any], message: str) -> None:
    parts = {"queries": {"q": "one"}, "corpus": {"d": "two"}, "relevant": {"q": {"d"}}, **change}
    with pytest.raises(DataError, match=message):
        evaluate_retrieval(tiny, SimpleNamespace(**parts))


@pytest.mark.parametrize("setting", ["k", "batch_size", "chunk"])
def test_wrong_settings_are_refused_by_name(tiny: SentenceTransformer, setting: str) -> None:
    with pytest.raises(ArgumentError, match=f"{setting}=0"):
        evaluate_retrieval(tiny, task(), **{setting: 0})


@pytest.mark.parametrize(("query", "n", "message"), [("nobody", 3, "nobody"), ("q0", 11, "larger k"), ("q0", 0, "n=0")])
def test_top_refuses_what_was_not_kept(result: RetrievalResult, query: str, n: int, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        result.top(query, n)


def test_broken_weights_are_named(tiny_dir: Callable[..., Path]) -> None:
    model = SentenceTransformer(str(tiny_dir("bert")), device="cpu")
    with torch.no_grad():
        next(model.parameters())[:] = float("nan")
    with pytest.raises(ModelError, match="NaN or infinity for 60 of 60 texts"):
        evaluate_retrieval(model, task())
