"""Clustering: do texts of one class end up in one cluster?"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from scipy.sparse import csr_array
from scipy.special import xlogy
from sentence_transformers import SentenceTransformer
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import v_measure_score

from embtune.data.ranking import embed
from embtune.errors import ArgumentError, DataError
from embtune.evaluate.bootstrap import Statistic
from embtune.evaluate.inputs import as_labels, as_texts, fingerprint
from embtune.evaluate.result import EvaluationResult


@dataclass(frozen=True, eq=False)
class ClusteringResult(EvaluationResult):
    """V-measure, the mean over several runs of k-means.

    A V-measure belongs to a whole clustering, so there is no score per item. The bootstrap draws texts and keeps
    the clusterings as they are.
    """

    kind: ClassVar[str] = "clustering"

    classes: np.ndarray
    """Number of each text's class (N,)."""
    clusters: np.ndarray
    """Number of each text's cluster in each run (R, N)."""
    run_v_measures: np.ndarray
    """V-measure of each run (R,)."""

    @property
    def v_measure(self) -> float:
        """Mean V-measure."""
        return self.metrics["v_measure"]

    def statistics(self) -> dict[str, Statistic]:
        return {"v_measure": _v_measure_statistic(self.classes, self.clusters)}


def evaluate_clustering(
    model: SentenceTransformer,
    texts: Iterable[str],
    labels: Iterable[Any],
    *,
    seed: int = 0,
    runs: int = 10,
    batch_size: int = 64,
    show_progress: bool = False,
) -> ClusteringResult:
    """Cluster the embeddings with k-means, as many clusters as labels, and compare with the labels.

    The V-measure is the harmonic mean of homogeneity and completeness (Rosenberg and Hirschberg, 2007). As in MTEB,
    k-means is scikit-learn's MiniBatchKMeans with batches of 512. One run depends much on its random start, so the
    mean over `runs` seeds, from `seed` on, is reported.

    Raises:
        DataError: lengths differ, or there are fewer than two different labels.
        ArgumentError: `runs` is below 1.
    """
    if runs < 1:
        raise ArgumentError(f"runs={runs} must be at least 1.")
    checked_texts = as_texts("texts", texts)
    checked_labels = as_labels("labels", labels, "texts", checked_texts)
    numbers = {label: number for number, label in enumerate(dict.fromkeys(checked_labels))}
    if len(numbers) < 2:
        raise DataError(f"labels holds only {checked_labels[0]!r}; clustering needs at least two different labels.")
    classes_N = np.array([numbers[label] for label in checked_labels])
    embeddings_NE = embed(model.encode, checked_texts, batch_size=batch_size, show_progress=show_progress).cpu().numpy()
    clusters_RN = np.stack(
        [
            MiniBatchKMeans(len(numbers), batch_size=512, n_init="auto", random_state=seed + run).fit_predict(
                embeddings_NE
            )
            for run in range(runs)
        ]
    )
    run_v_measures = np.array([v_measure_score(classes_N, clusters_N) for clusters_N in clusters_RN])
    return ClusteringResult(
        metrics={"v_measure": float(run_v_measures.mean())},
        items=len(checked_texts),
        fingerprint=fingerprint(checked_texts, checked_labels),
        classes=classes_N,
        clusters=clusters_RN,
        run_v_measures=run_v_measures,
    )


def _v_measure_statistic(classes_N: np.ndarray, clusters_RN: np.ndarray) -> Statistic:
    """Mean over runs of V = 2 I(class; cluster) / (H(class) + H(cluster)) within each draw.

    I = H(class) + H(cluster) - H(class and cluster); equal to the harmonic mean of homogeneity and completeness.
    """
    class_entropy = _entropy(classes_N)
    run_entropies = [
        (_entropy(clusters_N), _entropy(classes_N * (clusters_N.max() + 1) + clusters_N)) for clusters_N in clusters_RN
    ]

    def v_measure(counts_SN: np.ndarray) -> np.ndarray:
        counts_NS = np.ascontiguousarray(counts_SN.T)  # a sparse product with a transposed view is several times slower
        classes_S = class_entropy(counts_NS)
        runs_S = np.zeros(len(counts_SN))
        for cluster_entropy, joint_entropy in run_entropies:
            total_S = classes_S + cluster_entropy(counts_NS)
            information_S = total_S - joint_entropy(counts_NS)
            # A draw of a single class in a single cluster is a perfect clustering: 0 / 0 counts as 1.
            runs_S += np.divide(2 * information_S, total_S, out=np.ones_like(total_S), where=total_S > 1e-12)
        return runs_S / len(run_entropies)

    return v_measure


def _entropy(groups_N: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """counts_NS -> entropy in nats (S,) of how each draw spreads over the groups."""
    _, group_N = np.unique(groups_N, return_inverse=True)
    items = len(group_N)
    member_GN = csr_array((np.ones(items, dtype=np.int64), (group_N, np.arange(items))))
    possible = np.arange(items + 1)
    count_log_count = xlogy(possible, possible)  # looked up, because logarithms of every count take most of the time

    def entropy(counts_NS: np.ndarray) -> np.ndarray:
        return np.log(items) - count_log_count[member_GN @ counts_NS].sum(axis=0) / items

    return entropy
