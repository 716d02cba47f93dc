"""From what a model predicted on a task of MTEB to scores of single items, which a paired bootstrap needs.

mteb itself reports means alone. They are computed again here from its predictions, item by item, and are only used
where they add up to the score that mteb gives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from embtune.evaluate.bootstrap import Statistic, mean_statistic
from embtune.evaluate.inputs import fingerprint
from embtune.evaluate.result import EvaluationResult, ItemScores
from embtune.evaluate.retrieval import query_metrics
from embtune.evaluate.sts import rank_agreement, spearman_statistic

TOLERANCE = 1e-4  # mteb rounds some of its scores to five digits


@dataclass(frozen=True, eq=False)
class MtebItems(EvaluationResult):
    """One task's main score, and what it is made of."""

    kind: ClassVar[str] = "mteb"

    statistic: Statistic
    """The main score as a function of bootstrap draws."""
    scores: ItemScores
    """Of queries, pairs or texts."""

    def statistics(self) -> dict[str, Statistic]:
        return dict.fromkeys(self.metrics, self.statistic)

    def by_item(self) -> ItemScores:
        return self.scores


@dataclass(frozen=True)
class RetrievalPart:
    """What was found in one subset and split of a retrieval or reranking task."""

    found: Mapping[str, Mapping[str, float]]
    """Query id -> document id -> score of those that the model ranked."""
    relevant: Mapping[str, Mapping[str, int]]
    """Query id -> document id -> grade; 0 is not relevant."""
    queries: Mapping[str, str]
    """Query id -> text."""
    ignores_itself: bool = False
    """Whether a document with the id of the query does not count."""

    def scores(self, metric: str) -> ItemScores | None:
        """The metric of each query, ranked as trec_eval does: equal scores by document id, the last one first."""
        name, _, depth = metric.partition("_at_")
        if name not in ("ndcg", "mrr", "recall", "map") or not depth.isdecimal():
            return None
        ids = [query_id for query_id in self.found if query_id in self.relevant]
        values = [self._score(query_id, name, int(depth)) for query_id in ids]
        return ItemScores(metric, np.array(values), ids, [self.queries.get(query_id, "") for query_id in ids])

    def truth(self) -> list[Any]:
        """What identifies the data."""
        return [(query_id, sorted(self.relevant[query_id].items())) for query_id in self.found]

    def _score(self, query_id: str, name: str, k: int) -> float:
        grades = {document: grade for document, grade in self.relevant[query_id].items() if grade > 0}
        if not grades:
            return 0.0
        found = self.found[query_id].items()
        ranked = [document for document, _ in sorted(found, key=lambda each: (each[1], each[0]), reverse=True)]
        if self.ignores_itself and query_id in ranked:
            ranked.remove(query_id)
        ranked = ranked[:k]
        if name == "map":
            return average_precision(ranked, grades)
        ndcg, mrr, recall = query_metrics(ranked, grades, k)
        return {"ndcg": ndcg, "mrr": mrr, "recall": recall}[name]


@dataclass(frozen=True)
class SimilarityPart:
    """The similarities of one subset and split of an STS task."""

    similarities: Sequence[float]
    """The model's (N,)."""
    judged: Sequence[float]
    """People's (N,)."""
    texts: Sequence[str]
    """Both sentences of each pair, as one text (N,)."""

    def truth(self) -> list[Any]:
        """What identifies the data."""
        return list(zip(self.texts, self.judged, strict=True))


@dataclass(frozen=True)
class ClassPart:
    """The predictions in one subset and split of a classification."""

    predicted: Sequence[Sequence[Any]]
    """Of each of the probes (P, N)."""
    labels: Sequence[Any]
    """The right ones (N,)."""
    texts: Sequence[str]
    """What was classified (N,)."""

    def scores(self, metric: str) -> ItemScores | None:
        """The share of the probes that are right about each text."""
        if metric != "accuracy" or any(len(each) != len(self.labels) for each in self.predicted):
            return None
        right = [[guess == label for guess, label in zip(each, self.labels, strict=True)] for each in self.predicted]
        return ItemScores.of_rows(metric, np.mean(right, axis=0), self.texts)

    def truth(self) -> list[Any]:
        """What identifies the data."""
        return list(zip(self.texts, self.labels, strict=True))


Part = RetrievalPart | SimilarityPart | ClassPart


def average_precision(ranked: Sequence[str], relevant: Mapping[str, int]) -> float:
    """Mean over all relevant documents of the precision at their ranks; 0 for those that are not in `ranked`."""
    hits = np.array([document in relevant for document in ranked])
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    return float(precision[hits].sum() / len(relevant))


def mteb_items(metric: str, score: float, parts: Mapping[str, Part]) -> MtebItems | None:
    """The items behind a task's score, or None where they are not known or do not add up to it.

    Args:
        metric: the task's main score, as `mteb` calls it.
        score: what `mteb` gives; where there are several parts, the mean of their scores.
        parts: name of the subset and split -> what was predicted there.
    """
    made = _correlated(metric, parts) or _averaged(metric, parts)
    if made is None or len(made[1].scores) < 2:
        return None
    statistic, scores = made
    items = len(scores.scores)
    if not abs(statistic(np.ones((1, items), dtype=np.int64))[0] - score) <= TOLERANCE:
        return None
    truth = [entry for part in parts.values() for entry in part.truth()]
    return MtebItems({metric: score}, items, fingerprint([metric], scores.names, truth), statistic, scores)


def _averaged(metric: str, parts: Mapping[str, Part]) -> tuple[Statistic, ItemScores] | None:
    """A mean of scores of items; of several parts, the mean of their means."""
    found = {name: None if isinstance(part, SimilarityPart) else part.scores(metric) for name, part in parts.items()}
    known = {name: scores for name, scores in found.items() if scores is not None and len(scores.scores)}
    if not known or len(known) < len(parts):
        return None
    total = sum(len(scores.scores) for scores in known.values())
    # Weighted so that the plain mean over all items is the mean over the parts, whatever their sizes.
    shares = [scores.scores * (total / (len(known) * len(scores.scores))) for scores in known.values()]
    several = len(known) > 1
    items = ItemScores(
        metric,
        np.concatenate([scores.scores for scores in known.values()]),
        [f"{part} {name}" if several else name for part, scores in known.items() for name in scores.names],
        [text for scores in known.values() for text in scores.texts],
    )
    return mean_statistic(np.concatenate(shares)), items


def _correlated(metric: str, parts: Mapping[str, Part]) -> tuple[Statistic, ItemScores] | None:
    """Spearman's correlation, which belongs to all pairs of a part together; of several parts, the mean of theirs."""
    found = {name: part for name, part in parts.items() if isinstance(part, SimilarityPart)}
    too_small = any(len(part.judged) < 2 for part in found.values())
    if too_small or len(found) < len(parts) or metric not in ("cosine_spearman", "spearman"):
        return None
    statistics, scores, sizes = [], [], []
    names: list[str] = []
    texts: list[str] = []
    for name, part in found.items():
        similarities, judged = np.array(part.similarities, dtype=float), np.array(part.judged, dtype=float)
        statistics.append(spearman_statistic(similarities, judged))
        scores.append(rank_agreement(similarities, judged))
        names += [f"{name} {row}" if len(found) > 1 else str(row) for row in range(len(judged))]
        texts += part.texts
        sizes.append(len(judged))
    borders = np.cumsum(sizes)[:-1]

    def mean_of_parts(counts_SN: np.ndarray) -> np.ndarray:
        drawn = np.split(counts_SN, borders, axis=1)
        return np.mean([statistic(each) for statistic, each in zip(statistics, drawn, strict=True)], axis=0)

    return mean_of_parts, ItemScores("rank agreement", np.concatenate(scores), names, texts)
