"""STS, clustering and classification, each against scikit-learn, scipy or sentence-transformers."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, v_measure_score

from embtune.errors import ArgumentError, DataError, ModelError
from embtune.evaluate import (
    ClassificationResult,
    ClusteringResult,
    StsResult,
    evaluate_classification,
    evaluate_clustering,
    evaluate_sts,
)
from embtune.evaluate.bootstrap import draws

FIRST = ["A cat sleeps.", "A man plays a guitar.", "The stock fell.", "It rains.", "A cat sleeps.", "He cooks soup."]
SECOND = ["A cat is asleep.", "Someone makes music.", "Shares went down.", "Snow melts.", "A car drives.", "Run!"]
SCORES = [5.0, 3.5, 4.5, 1.5, 0.0, 0.0]
TOPICS = {
    "animals": ["cat", "dog", "horse", "cow", "mouse", "lion", "tiger", "wolf"],
    "food": ["bread", "soup", "cheese", "rice", "salad", "pizza", "apple", "butter"],
    "music": ["guitar", "piano", "drum", "violin", "flute", "trumpet", "song", "melody"],
}
TEXTS = [f"{word} {i}" for i in range(2) for words in TOPICS.values() for word in words]
LABELS = [topic for _ in range(2) for topic, words in TOPICS.items() for _ in words]


@pytest.fixture(scope="module")
def minilm(minilm_dir: Path) -> SentenceTransformer:
    return SentenceTransformer(str(minilm_dir), device="cpu")


@pytest.fixture(scope="module")
def sts(minilm: SentenceTransformer) -> StsResult:
    return evaluate_sts(minilm, FIRST, SECOND, SCORES)


@pytest.fixture(scope="module")
def clustering(minilm: SentenceTransformer) -> ClusteringResult:
    return evaluate_clustering(minilm, TEXTS, LABELS, runs=3)


@pytest.fixture(scope="module")
def classification(minilm: SentenceTransformer) -> ClassificationResult:
    shuffled = [*LABELS[24:40], *LABELS[24:32]]  # eight wrong test labels, so that nothing is perfect
    return evaluate_classification(minilm, TEXTS[:24], LABELS[:24], TEXTS[24:], shuffled)


def test_sts_equals_sentence_transformers(minilm: SentenceTransformer, sts: StsResult) -> None:
    theirs = EmbeddingSimilarityEvaluator(FIRST, SECOND, SCORES, write_csv=False)(minilm)
    assert sts.spearman == pytest.approx(theirs["spearman_cosine"], abs=1e-9)
    assert sts.pearson == pytest.approx(theirs["pearson_cosine"], abs=1e-6)
    assert sts.metrics == {"spearman": sts.spearman, "pearson": sts.pearson}
    assert sts.items == 6


def test_sts_rank_agreement_is_one_where_the_order_is_right(sts: StsResult) -> None:
    ranks = np.argsort(np.argsort(sts.similarities))
    assert ranks[0] == 5  # the paraphrase is found the most similar pair, as people say
    items = sts.by_item()
    assert items.scores[0] == 1
    assert (items.scores >= 0).all()
    assert items.texts[0] == "A cat sleeps. ↔ A cat is asleep."


def test_sts_draws_equal_scipy_on_repeated_pairs(sts: StsResult) -> None:
    statistics = sts.statistics()
    # scores repeat, and draws repeat pairs: both kinds of tie
    counts_SN = next(draws(6, 200, seed=0))
    counts_SN = counts_SN[(counts_SN > 0).sum(axis=1) > 2]
    for row, counts_N in enumerate(counts_SN):
        drawn = np.repeat(np.arange(6), counts_N)
        if np.ptp(sts.scores[drawn]) == 0:
            continue
        x, y = sts.similarities[drawn], sts.scores[drawn]
        assert statistics["spearman"](counts_SN)[row] == pytest.approx(spearmanr(x, y).statistic)
        assert statistics["pearson"](counts_SN)[row] == pytest.approx(pearsonr(x, y).statistic)


def test_sts_draw_of_one_pair_only_counts_as_no_correlation(sts: StsResult) -> None:
    for statistic in sts.statistics().values():
        assert statistic(np.array([[6, 0, 0, 0, 0, 0]])) == pytest.approx(0)


def test_clustering_averages_v_measures(clustering: ClusteringResult) -> None:
    assert clustering.clusters.shape == (3, 48)
    by_run = [v_measure_score(LABELS, clusters) for clusters in clustering.clusters]
    assert clustering.v_measure == pytest.approx(np.mean(by_run))
    assert 0.3 < clustering.v_measure <= 1


def test_clustering_is_the_same_for_the_same_seed(minilm: SentenceTransformer, clustering: ClusteringResult) -> None:
    again = evaluate_clustering(minilm, TEXTS, LABELS, runs=3)
    assert np.array_equal(again.clusters, clustering.clusters)
    other = evaluate_clustering(minilm, TEXTS, LABELS, runs=1, seed=2)
    assert np.array_equal(other.clusters[0], clustering.clusters[2])


def test_clustering_draws_equal_sklearn_on_repeated_texts(clustering: ClusteringResult) -> None:
    counts_SN = next(draws(48, 50, seed=0))
    ours = clustering.statistics()["v_measure"](counts_SN)
    for row, counts_N in enumerate(counts_SN):
        drawn = np.repeat(np.arange(48), counts_N)
        runs = [v_measure_score(clustering.classes[drawn], clusters[drawn]) for clusters in clustering.clusters]
        assert ours[row] == pytest.approx(np.mean(runs))
    assert clustering.statistics()["v_measure"](np.eye(48, dtype=np.int64)[:1] * 48) == pytest.approx(1)


def test_classification_equals_sklearn(minilm: SentenceTransformer, classification: ClassificationResult) -> None:
    probe = LogisticRegression(max_iter=1000).fit(minilm.encode(TEXTS[:24]), LABELS[:24])
    assert list(classification.predictions) == probe.predict(minilm.encode(TEXTS[24:])).tolist()
    assert classification.accuracy == pytest.approx(classification.correct.mean())
    expected = f1_score(classification.labels, classification.predictions, average="macro")
    assert classification.macro_f1 == pytest.approx(expected)
    assert 0.3 < classification.accuracy < 0.9


def test_classification_draws_equal_sklearn_on_repeated_texts(classification: ClassificationResult) -> None:
    counts_SN = next(draws(24, 50, seed=0))
    counts_SN[0] = 24 * np.eye(24)[0]  # labels that do not occur in a draw must not count
    labels, predictions = np.array(classification.labels), np.array(classification.predictions)
    accuracy, macro_f1 = (statistic(counts_SN) for statistic in classification.statistics().values())
    for row, counts_N in enumerate(counts_SN):
        drawn = np.repeat(np.arange(24), counts_N)
        assert accuracy[row] == pytest.approx((labels[drawn] == predictions[drawn]).mean())
        assert macro_f1[row] == pytest.approx(f1_score(labels[drawn], predictions[drawn], average="macro"))


@pytest.mark.parametrize("kind", ["sts", "clustering", "classification"])
def test_statistics_of_the_data_itself_are_the_metrics(kind: str, request: pytest.FixtureRequest) -> None:
    result = request.getfixturevalue(kind)
    whole = np.ones((1, result.items), dtype=np.int64)
    values = {metric: statistic(whole)[0] for metric, statistic in result.statistics().items()}
    assert values == pytest.approx(result.metrics)
    assert result.to_dict() == {"kind": kind, "items": result.items, "metrics": result.metrics}


def test_whole_numbers_of_any_type_are_labels(minilm: SentenceTransformer) -> None:
    python = evaluate_classification(minilm, TEXTS[:4], [0, 1, 0, 1], TEXTS[4:6], [0, 1])
    numpy = evaluate_classification(minilm, TEXTS[:4], np.array([0, 1, 0, 1]), TEXTS[4:6], np.array([0, 1]))
    assert python.fingerprint == numpy.fingerprint
    assert python.predictions == numpy.predictions


@pytest.mark.parametrize(
    ("first", "second", "scores", "message"),
    [
        (FIRST, SECOND[:-1], SCORES, "sentences1 has 6 rows and sentences2 has 5"),
        (FIRST, SECOND, SCORES[:-1], "sentences1 has 6 rows and scores has 5"),
        ([], [], [], "sentences1 is empty"),
        (FIRST[:2], SECOND[:2], SCORES[:2], "at least 3"),
        (FIRST, SECOND, [*SCORES[:-1], float("nan")], r"scores\[5\] is nan"),
        (FIRST, SECOND, [*SCORES[:-1], "5"], r"scores\[5\] is '5'"),
        (FIRST, SECOND, [1.0] * 6, "All scores are 1"),
        ([*FIRST[:-1], None], SECOND, SCORES, r"sentences1\[5\] is None"),
        ("A cat sleeps.", SECOND, SCORES, "sentences1 is one string"),
    ],
)
def test_sts_refuses_wrong_data(
    minilm: SentenceTransformer, first: list, second: list, scores: list, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        evaluate_sts(minilm, first, second, scores)


def test_sts_names_a_collapsed_model(minilm: SentenceTransformer) -> None:
    with pytest.raises(ModelError, match="collapsed"):
        evaluate_sts(minilm, ["a"] * 3, ["b"] * 3, [1, 2, 3])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[:-1], "texts has 48 rows and labels has 47"),
        (["x"] * 48, "labels holds only 'x'"),
        ([0.5] * 48, r"labels\[0\] is 0.5"),
    ],
)
def test_clustering_refuses_wrong_labels(minilm: SentenceTransformer, labels: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate_clustering(minilm, TEXTS, labels)


def test_clustering_refuses_no_runs(minilm: SentenceTransformer) -> None:
    with pytest.raises(ArgumentError, match="runs=0"):
        evaluate_clustering(minilm, TEXTS, LABELS, runs=0)


@pytest.mark.parametrize(
    ("train_labels", "test_labels", "message"),
    [
        (["a", "a"], ["a", "a"], "train_labels holds only 'a'"),
        (["a", "b"], ["a", "c"], r"test_labels\[1\] is 'c'"),
        (["a", "b"], ["a"], "test_texts has 2 rows and test_labels has 1"),
        (["a", None], ["a", "a"], r"train_labels\[1\] is None"),
    ],
)
def test_classification_refuses_wrong_labels(
    minilm: SentenceTransformer, train_labels: list, test_labels: list, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        evaluate_classification(minilm, TEXTS[:2], train_labels, TEXTS[2:4], test_labels)
