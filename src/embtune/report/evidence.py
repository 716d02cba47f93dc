"""What a before/after evaluation leaves for the report page, bounded in size: metrics, queries, similarities, a map.

Shapes: P pairs of a query and its right document, E dimensions of an embedding.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from sentence_transformers import SentenceTransformer

from embtune.data.retrieval import RetrievalData
from embtune.evaluate.compare import Comparison, ItemChange
from embtune.evaluate.result import EvaluationResult, ItemScores
from embtune.evaluate.retrieval import RetrievalResult

PAIRS = 150  # on the map: twice as many points
QUERIES = 150  # in the explorer
HITS = 5  # of each query, before and after
RIGHT = 5  # right documents named for a query
TEXT = 240  # characters kept of a text
ITEMS = 20_000  # scores kept, so that runs can be compared with one another
LABEL = 80  # characters that name a point of the map
BINS = 40


@dataclass(frozen=True)
class Sample:
    """Held-out queries, each with one right document, that are embedded before and after training."""

    queries: dict[str, str]
    """Query id -> text."""
    documents: dict[str, str]
    """Query id -> text of its document of the highest grade."""
    unrelated: np.ndarray
    """Whether the document of pair j is no right answer to query i (P, P)."""

    @classmethod
    def of(cls, data: RetrievalData, pairs: int = PAIRS, seed: int = 0) -> "Sample":
        """Draw `pairs` queries at random."""
        ids = list(data.queries)
        chosen = np.sort(np.random.default_rng(seed).permutation(len(ids))[:pairs])
        queries = {ids[index]: data.queries[ids[index]] for index in chosen}
        best = {query: _best(data.relevant[query]) for query in queries}
        unrelated = [[document not in data.relevant[query] for document in best.values()] for query in queries]
        texts = {query: data.corpus[document] for query, document in best.items()}
        return cls(queries, texts, np.array(unrelated))

    def embed(self, model: SentenceTransformer) -> np.ndarray:
        """Embeddings of length 1, queries before documents (2, P, E)."""
        options: dict[str, Any] = {"show_progress_bar": False, "normalize_embeddings": True, "convert_to_tensor": True}
        queries = model.encode_query(list(self.queries.values()), **options)
        documents = model.encode_document(list(self.documents.values()), **options)
        # A model that diverged embeds as NaN; its run shall still end with a page.
        return np.stack([part.float().nan_to_num().cpu().numpy() for part in (queries, documents)])


class Evidence:
    """One data set that a model is measured on before and after training.

    Args:
        name: of the data, as the page calls it.
        data: what is measured on; of retrieval the page can show more than metrics.
        role: `task` for what was trained for, `forgetting` for what should not get worse.
    """

    def __init__(self, name: str, data: Any, role: Literal["task", "forgetting"] = "task") -> None:
        self.name = name
        self.role = role
        self._data = data
        self._sample = Sample.of(data) if isinstance(data, RetrievalData) and role == "task" else None
        self._before: tuple[EvaluationResult, np.ndarray | None] | None = None

    def see_before(self, model: SentenceTransformer, result: EvaluationResult) -> None:
        """Keep what was measured before training, and embed a few texts for the map."""
        self._before = result, self._sample.embed(model) if self._sample else None

    def compared(self, model: SentenceTransformer, after: EvaluationResult, comparison: Comparison) -> dict[str, Any]:
        """The fields of a `comparison` event.

        Args:
            comparison: of the result that `see_before` was given with `after`.
        """
        assert self._before is not None, "call see_before first"
        before, embeddings = self._before
        fields = self._metrics(before, after, comparison)
        if isinstance(before, RetrievalResult) and isinstance(after, RetrievalResult):
            _add_hits(fields, before, after, self._data)
        if self._sample is not None and embeddings is not None:
            both = embeddings, self._sample.embed(model)
            fields["similarity"] = _similarities(self._sample, both)
            fields["map"] = _map(self._sample, both)
        return fields

    def _metrics(self, before: EvaluationResult, after: EvaluationResult, comparison: Comparison) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "name": self.name,
            "role": self.role,
            "kind": before.kind,
            "items": before.items,
            "fingerprint": before.fingerprint,
            "metrics": {metric: change.to_dict() for metric, change in comparison.metrics.items()},
            "item_metric": comparison.item_metric,
            "counts": {"better": comparison.wins, "worse": comparison.losses, "unchanged": comparison.ties},
        }
        items_before, items_after = before.by_item(), after.by_item()
        if items_before is not None and items_after is not None:
            fields["queries"] = _queries(items_before, items_after, comparison)
            if before.items <= ITEMS:
                scores = {"before": items_before.scores, "after": items_after.scores}
                fields["scores"] = {side: np.round(values, 4) for side, values in scores.items()}
        return fields


def _add_hits(fields: dict[str, Any], before: RetrievalResult, after: RetrievalResult, data: RetrievalData) -> None:
    """Ranked results of each query, and the texts of the documents in them."""
    texts = _Texts(data.corpus)
    for query in fields["queries"]:
        relevant = data.relevant[query["id"]]
        query["right"] = [texts.index(document) for document in _graded(relevant)[:RIGHT]]
        for side, result in (("before", before), ("after", after)):
            hits = result.hits[query["id"]]
            right = [rank for rank, hit in enumerate(hits, 1) if hit.document_id in relevant]
            query[side] |= {
                "rank": right[0] if right else None,
                "hits": [
                    [texts.index(hit.document_id), round(hit.score, 4), hit.document_id in relevant]
                    for hit in hits[:HITS]
                ],
            }
    fields["documents"] = texts.kept
    fields["depth"] = len(next(iter(before.hits.values())))


class _Texts:
    """Documents by number, each cut and kept once."""

    def __init__(self, corpus: Mapping[str, str]) -> None:
        self.kept: list[dict[str, str]] = []
        self._corpus = corpus
        self._numbers: dict[str, int] = {}

    def index(self, document: str) -> int:
        if document not in self._numbers:
            self._numbers[document] = len(self.kept)
            self.kept.append({"id": document, "text": _cut(self._corpus[document])})
        return self._numbers[document]


def _queries(before: ItemScores, after: ItemScores, comparison: Comparison) -> list[dict[str, Any]]:
    """The worst regressions, the best improvements, and unchanged items in the order of the data; worst first."""
    worse, better = _fair_shares(len(comparison.regressions), len(comparison.improvements), QUERIES)
    changes = [*comparison.regressions[:worse], *reversed(comparison.improvements[:better])]
    changed = {change.item for change in (*comparison.regressions, *comparison.improvements)}
    rows = zip(before.names, before.texts, before.scores, after.scores, strict=True)
    same = [ItemChange(name, text, old, new) for name, text, old, new in rows if name not in changed]
    changes[worse:worse] = same[: QUERIES - len(changes)]
    return [
        {
            "id": change.item,
            "text": _cut(change.text),
            "before": {"score": round(float(change.before), 4)},
            "after": {"score": round(float(change.after), 4)},
        }
        for change in changes
    ]


def _fair_shares(first: int, second: int, places: int) -> tuple[int, int]:
    """How many of each get a place: half for each, and what one leaves free for the other."""
    half = places // 2
    taken = min(first, max(half, places - second))
    return taken, min(second, places - taken)


def _similarities(sample: Sample, embeddings: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """Histograms of cosine similarities: queries with their right document, and with those of other queries."""
    cosines = [queries @ documents.T for queries, documents in embeddings]
    values = {
        side: {"right": cosine.diagonal(), "unrelated": cosine[sample.unrelated]}
        for side, cosine in zip(("before", "after"), cosines, strict=True)
    }
    every = np.concatenate([part for pair in values.values() for part in pair.values()])
    edges = np.linspace(float(every.min()), max(float(every.max()), float(every.min()) + 1e-3), BINS + 1)
    return {
        "edges": edges.round(5),
        "pairs": len(sample.queries),
        **{
            side: {name: {"counts": np.histogram(part, edges)[0], "mean": _mean(part)} for name, part in pair.items()}
            for side, pair in values.items()
        },
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _map(sample: Sample, embeddings: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """Both models' embeddings in the plane in which all of them together vary most (principal components)."""
    before, after = embeddings
    points = np.concatenate([before.reshape(-1, before.shape[-1]), after.reshape(-1, after.shape[-1])])
    points = points - points.mean(axis=0)
    _, singular, axes = np.linalg.svd(points, full_matrices=False)
    plane = (points @ axes[:2].T).reshape(2, *before.shape[:2], -1).round(4)
    shown = float((singular[:2] ** 2).sum() / max((singular**2).sum(), 1e-12))
    return {
        "variance": shown,
        "queries": list(sample.queries),
        "texts": [_cut(text, LABEL) for text in sample.queries.values()],
        "before": {"queries": plane[0, 0], "documents": plane[0, 1]},
        "after": {"queries": plane[1, 0], "documents": plane[1, 1]},
    }


def _graded(relevant: Set[str] | Mapping[str, int]) -> Sequence[str]:
    """Right documents, the highest grade first."""
    if isinstance(relevant, Mapping):
        return sorted(relevant, key=lambda document: (-relevant[document], document))
    return sorted(relevant)


def _best(relevant: Set[str] | Mapping[str, int]) -> str:
    return _graded(relevant)[0]


def _cut(text: str, most: int = TEXT) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
