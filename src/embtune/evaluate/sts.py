"""Semantic textual similarity: does the model's similarity order sentence pairs as people did?"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.stats import pearsonr, rankdata, spearmanr, zscore
from sentence_transformers import SentenceTransformer

from embtune.data.ranking import embed
from embtune.errors import DataError, ModelError
from embtune.evaluate.bootstrap import Statistic
from embtune.evaluate.inputs import as_texts, check_same_length, fingerprint
from embtune.evaluate.result import EvaluationResult, ItemScores


@dataclass(frozen=True, eq=False)
class StsResult(EvaluationResult):
    """Spearman's and Pearson's correlation of the model's similarities with the given scores."""

    kind: ClassVar[str] = "sts"

    pairs: tuple[tuple[str, str], ...]
    """The sentence pairs, in the order of the arrays."""
    scores: np.ndarray
    """The given scores (N,)."""
    similarities: np.ndarray
    """The model's similarities (N,)."""

    @property
    def spearman(self) -> float:
        """Spearman's rank correlation."""
        return self.metrics["spearman"]

    @property
    def pearson(self) -> float:
        """Pearson's correlation."""
        return self.metrics["pearson"]

    def by_item(self) -> ItemScores:
        agreement = rank_agreement(self.similarities, self.scores)
        return ItemScores.of_rows("rank agreement", agreement, [" ↔ ".join(pair) for pair in self.pairs])

    def statistics(self) -> dict[str, Statistic]:
        similarities, scores = zscore(self.similarities)[None], zscore(self.scores)[None]
        return {
            "spearman": spearman_statistic(self.similarities, self.scores),
            "pearson": lambda counts_SN: _correlation(counts_SN, similarities, scores),
        }


def evaluate_sts(
    model: SentenceTransformer,
    sentences1: Iterable[str],
    sentences2: Iterable[str],
    scores: Iterable[float],
    *,
    batch_size: int = 64,
    show_progress: bool = False,
) -> StsResult:
    """Correlate the model's own similarity of each pair with the given scores (any scale, higher is more similar).

    Raises:
        DataError: lengths differ, fewer than three pairs, a score is no finite number, or all scores are equal.
        ModelError: the model gives all pairs the same similarity.
    """
    first, second = as_texts("sentences1", sentences1), as_texts("sentences2", sentences2)
    check_same_length("sentences1", first, "sentences2", second)
    scores_N = _checked_scores(list(scores), first)
    embeddings1 = embed(model.encode, first, batch_size=batch_size, show_progress=show_progress)
    embeddings2 = embed(model.encode, second, batch_size=batch_size, show_progress=show_progress)
    similarities_N = model.similarity_pairwise(embeddings1, embeddings2).cpu().double().numpy()
    if np.ptp(similarities_N) == 0:
        raise ModelError("The model gives every pair the same similarity; its embeddings have collapsed to one point.")
    return StsResult(
        metrics={
            "spearman": float(spearmanr(similarities_N, scores_N).statistic),
            "pearson": float(pearsonr(similarities_N, scores_N).statistic),
        },
        items=len(first),
        fingerprint=fingerprint(first, second, scores_N.tolist()),
        pairs=tuple(zip(first, second, strict=True)),
        scores=scores_N,
        similarities=similarities_N,
    )


def rank_agreement(similarities_N: np.ndarray, scores_N: np.ndarray) -> np.ndarray:
    """1 - |rank by similarity - rank by score| / (N - 1) of each pair: 1 where it has its right place in the order."""
    return 1 - np.abs(rankdata(similarities_N) - rankdata(scores_N)) / (len(scores_N) - 1)


def spearman_statistic(similarities_N: np.ndarray, scores_N: np.ndarray) -> Statistic:
    """Spearman's correlation as a function of draws."""
    similarity_ranks, score_ranks = _ranks(similarities_N), _ranks(scores_N)
    return lambda counts_SN: _correlation(counts_SN, similarity_ranks(counts_SN), score_ranks(counts_SN))


def _checked_scores(scores: list[float], sentences: list[str]) -> np.ndarray:
    check_same_length("sentences1", sentences, "scores", scores)
    if len(scores) < 3:
        raise DataError(f"There are {len(scores)} pairs; a correlation needs at least 3.")
    for row, score in enumerate(scores):
        if not isinstance(score, int | float | np.number) or not np.isfinite(score):
            raise DataError(f"scores[{row}] is {score!r}; a finite number is needed.")
    scores_N = np.array(scores, dtype=np.float64)
    if np.ptp(scores_N) == 0:
        raise DataError(f"All scores are {scores_N[0]:g}; a correlation needs scores that differ.")
    return scores_N


def _ranks(values_N: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """counts_SN -> the rank of each item within each draw (S, N), minus the mean rank; equal values share their rank.

    The values are sorted once; within a draw, the last rank of a value is the running total of counts up to it.
    """
    order_N = np.argsort(values_N, kind="stable")
    _, group_N, sizes_G = np.unique(values_N, return_inverse=True, return_counts=True)
    starts_G = sizes_G.cumsum() - sizes_G
    mean_rank = (len(values_N) + 1) / 2

    def ranks(counts_SN: np.ndarray) -> np.ndarray:
        counts_SG = np.add.reduceat(counts_SN[:, order_N], starts_G, axis=1)
        return (counts_SG.cumsum(axis=1) - (counts_SG - 1) / 2 - mean_rank)[:, group_N]

    return ranks


def _correlation(counts_SN: np.ndarray, x_SN: np.ndarray, y_SN: np.ndarray) -> np.ndarray:
    """Pearson's correlation within each draw; 0 where a draw holds one value only and none is defined.

    `x_SN` and `y_SN` (one row does for all draws) must be centred roughly, or the subtractions lose digits.
    """
    total = np.maximum(counts_SN.sum(axis=1), 1)
    mean_x = np.einsum("sn,sn->s", counts_SN, x_SN) / total
    mean_y = np.einsum("sn,sn->s", counts_SN, y_SN) / total
    variance_x = np.einsum("sn,sn,sn->s", counts_SN, x_SN, x_SN) / total - mean_x**2
    variance_y = np.einsum("sn,sn,sn->s", counts_SN, y_SN, y_SN) / total - mean_y**2
    covariance = np.einsum("sn,sn,sn->s", counts_SN, x_SN, y_SN) / total - mean_x * mean_y
    scale = np.sqrt(np.maximum(variance_x * variance_y, 0))
    return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 1e-12)
