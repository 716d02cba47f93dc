"""Retrieval: does the model rank the right documents first? nDCG, MRR and recall at k, for each query."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from sentence_transformers import SentenceTransformer

from embtune.data.ranking import rank_documents
from embtune.data.retrieval import RetrievalData
from embtune.errors import ArgumentError, DataError
from embtune.evaluate.bootstrap import Statistic, mean_statistic
from embtune.evaluate.inputs import fingerprint
from embtune.evaluate.result import EvaluationResult, ItemScores

KEPT = 10


class Hit(NamedTuple):
    """One retrieved document."""

    document_id: str
    score: float


@dataclass(frozen=True, eq=False)
class RetrievalResult(EvaluationResult):
    """Metrics at `k`, for each query and as means, and the documents that were found."""

    kind: ClassVar[str] = "retrieval"

    k: int
    """Depth of the metrics."""
    queries: dict[str, str]
    """Query id -> text, in the order of the arrays."""
    ndcg: np.ndarray
    """nDCG@k of each query (Q,)."""
    mrr: np.ndarray
    """1 / rank of the first relevant document, 0 if none is in the first k (Q,)."""
    recall: np.ndarray
    """Share of the query's relevant documents that are in the first k (Q,)."""
    hits: dict[str, tuple[Hit, ...]]
    """Query id -> the best max(k, 10) documents, best first."""

    def top(self, query_id: str, n: int = 3) -> tuple[Hit, ...]:
        """The `n` best documents of a query (fewer if the corpus is smaller), best first.

        Raises:
            ArgumentError: the query is unknown, or more is asked than was kept (`max(k, 10)`).
        """
        if query_id not in self.hits:
            raise ArgumentError(f"No query has the id {query_id!r}.")
        if not 1 <= n <= max(self.k, KEPT):
            raise ArgumentError(
                f"n={n}: between 1 and {max(self.k, KEPT)} documents are kept for each query; evaluate with a larger k."
            )
        return self.hits[query_id][:n]

    def by_item(self) -> ItemScores:
        return ItemScores(f"ndcg@{self.k}", self.ndcg, list(self.queries), list(self.queries.values()))

    def statistics(self) -> dict[str, Statistic]:
        arrays = (self.ndcg, self.mrr, self.recall)
        return {metric: mean_statistic(scores) for metric, scores in zip(self.metrics, arrays, strict=True)}


def evaluate_retrieval(
    model: SentenceTransformer,
    data: RetrievalData,
    *,
    k: int = 10,
    batch_size: int = 64,
    chunk: int = 2048,
    show_progress: bool = False,
) -> RetrievalResult:
    """Rank the whole corpus for each query by the model's own similarity and measure the first `k`.

    Queries go through `encode_query` and documents through `encode_document`, so saved prompts apply. nDCG follows
    trec_eval and BEIR: the gain of a document is its grade (linear, not 2^grade - 1), the discount of rank r is
    1 / log2(r + 1), and the ideal takes all relevant documents of the query; with sets all grades are 1 (Järvelin and
    Kekäläinen, "Cumulated Gain-Based Evaluation of IR Techniques", 2002). Equal scores rank by document id. A document
    with the id of the query is ranked like any other. Every query counts.

    Args:
        data: `RetrievalData`, or any object with its three attributes.
        chunk: documents encoded and scored at a time; memory grows with it, results do not depend on it.

    Raises:
        DataError: no queries or documents, a query without relevant documents, an id that does not exist, an id
            or text that is no string.
        ArgumentError: `k`, `batch_size` or `chunk` below 1.
    """
    for name, value in (("k", k), ("batch_size", batch_size), ("chunk", chunk)):
        if value < 1:
            raise ArgumentError(f"{name}={value} must be at least 1.")
    data = _checked(data)
    grades = {query_id: _grades(data.relevant[query_id]) for query_id in data.queries}
    queries = dict(data.queries)
    document_ids = sorted(data.corpus)
    scores_QN, positions_QN = rank_documents(
        model,
        list(queries.values()),
        [data.corpus[document_id] for document_id in document_ids],
        keep=max(k, KEPT),
        batch_size=batch_size,
        chunk=chunk,
        show_progress=show_progress,
    )
    hits = {
        query_id: tuple(Hit(document_ids[position], score) for position, score in zip(positions, scores, strict=True))
        for query_id, positions, scores in zip(queries, positions_QN.tolist(), scores_QN.tolist(), strict=True)
    }
    per_query = np.array(
        [query_metrics([hit.document_id for hit in hits[query_id][:k]], grades[query_id], k) for query_id in queries]
    )
    ndcg, mrr, recall = per_query.T
    return RetrievalResult(
        metrics={f"ndcg@{k}": float(ndcg.mean()), f"mrr@{k}": float(mrr.mean()), f"recall@{k}": float(recall.mean())},
        items=len(queries),
        fingerprint=fingerprint(
            queries.items(),
            ((document_id, data.corpus[document_id]) for document_id in document_ids),
            (sorted(grades[query_id].items()) for query_id in queries),
        ),
        k=k,
        queries=queries,
        ndcg=ndcg,
        mrr=mrr,
        recall=recall,
        hits=hits,
    )


def query_metrics(ranked: Sequence[str], grades: Mapping[str, int], k: int) -> tuple[float, float, float]:
    """nDCG@k, reciprocal rank within k and recall@k of one query.

    Args:
        ranked: ids of the documents that were found, best first, at most `k`.
        grades: relevant document -> its grade, above 0.
    """
    gains = np.array([grades.get(document, 0) for document in ranked])
    ideal = np.array(sorted(grades.values(), reverse=True)[:k])
    found = np.flatnonzero(gains)
    reciprocal_rank = 1 / (found[0] + 1) if len(found) else 0.0
    return _dcg(gains) / _dcg(ideal), reciprocal_rank, len(found) / len(grades)


def _dcg(gains: np.ndarray) -> float:
    return float(gains @ (1 / np.log2(np.arange(2, len(gains) + 2))))


def _checked(data: RetrievalData) -> RetrievalData:
    """`data` with its ids checked, which its class does, and its texts."""
    data = RetrievalData(data.queries, data.corpus, data.relevant)
    for name, texts in (("queries", data.queries), ("corpus", data.corpus)):
        for text_id, text in texts.items():
            if not isinstance(text_id, str) or not isinstance(text, str):
                raise DataError(f"{name} has {text_id!r}: {text!r}; ids and texts are needed as strings.")
    return data


def _grades(relevant: Set[str] | Mapping[str, int]) -> Mapping[str, int]:
    return relevant if isinstance(relevant, Mapping) else dict.fromkeys(relevant, 1)
