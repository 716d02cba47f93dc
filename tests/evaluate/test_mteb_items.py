"""Scores of items from what a model predicted on tasks of MTEB; none of it needs the package mteb."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from embtune.cli.display import make_console
from embtune.cli.mteb_tables import NOT_KNOWN, mteb_as_dict, show_mteb
from embtune.errors import DataError
from embtune.evaluate import paired_bootstrap
from embtune.evaluate.mteb_items import ClassPart, RetrievalPart, SimilarityPart, mteb_items
from embtune.evaluate.mteb_tasks import MtebScore

FOUND = {
    "q1": {"a": 0.9, "b": 0.9, "c": 0.1},  # of equal scores the last id is first: b, a, c
    "q2": {"q2": 1.0, "a": 0.5, "c": 0.2},
    "q3": {"a": 0.3},
}
RELEVANT = {"q1": {"a": 1, "c": 2, "b": 0}, "q2": {"q2": 1, "c": 1}, "q3": {"b": 1}, "q4": {"a": 1}}
QUERIES = {"q1": "one", "q2": "two", "q3": "three", "q4": "four"}


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("mrr_at_10", [1 / 2, 1, 0]),
        ("recall_at_2", [1 / 2, 1 / 2, 0]),
        ("map_at_10", [(1 / 2 + 2 / 3) / 2, (1 + 2 / 3) / 2, 0]),
        ("ndcg_at_3", [(1 / np.log2(3) + 2 / 2) / (2 + 1 / np.log2(3)), 1.5 / (1 + 1 / np.log2(3)), 0]),
    ],
)
def test_each_query_is_ranked_as_trec_eval_does(metric: str, expected: list[float]) -> None:
    scores = RetrievalPart(FOUND, RELEVANT, QUERIES).scores(metric)
    assert scores.scores == pytest.approx(expected)
    assert (scores.names, scores.texts) == (["q1", "q2", "q3"], ["one", "two", "three"])


def test_a_query_may_not_find_itself() -> None:
    scores = RetrievalPart(FOUND, RELEVANT, QUERIES, ignores_itself=True).scores("mrr_at_10")
    assert scores.scores == pytest.approx([1 / 2, 1 / 2, 0])


def test_items_are_taken_where_they_add_up_alone() -> None:
    part = RetrievalPart(FOUND, RELEVANT, QUERIES)
    score = part.scores("ndcg_at_10").scores.mean()
    items = mteb_items("ndcg_at_10", round(score, 5), {"default/test": part})
    assert items.items == 3
    assert items.by_item().names == ["q1", "q2", "q3"]
    assert mteb_items("ndcg_at_10", score + 0.001, {"default/test": part}) is None
    for unknown in ("max_ap", "ndcg_at_", "accuracy"):
        assert mteb_items(unknown, score, {"default/test": part}) is None
    only = RetrievalPart({"q1": FOUND["q1"]}, RELEVANT, QUERIES)
    assert mteb_items("mrr_at_10", 0.5, {"default/test": only}) is None  # one item says nothing of chance


def test_of_several_subsets_each_counts_alike() -> None:
    parts = {
        "de/test": ClassPart([[0, 1, 1, 0], [0, 0, 1, 0]], [0, 1, 1, 1], ["a", "b", "c", "d"]),
        "en/test": ClassPart([[0, 1], [1, 1]], [0, 1], ["e", "f"]),
    }
    means = np.mean([1, 0.5, 1, 0]), np.mean([0.5, 1])
    items = mteb_items("accuracy", float(np.mean(means)), parts)
    assert items.by_item().scores.tolist() == [1, 0.5, 1, 0, 0.5, 1]
    assert items.by_item().names[0] == "de/test 0"
    assert (
        mteb_items("accuracy", float(np.mean(means)), {**parts, "fr/test": ClassPart([[1]], [0, 1], ["g", "h"])})
        is None
    )


def test_spearman_belongs_to_all_pairs_of_a_subset() -> None:
    generator = np.random.default_rng(0)
    judged, similarities = generator.random(20).round(1), generator.random(20)
    part = SimilarityPart(list(similarities), list(judged), [f"a ↔ {n}" for n in range(20)])
    score = spearmanr(similarities, judged).statistic
    items = mteb_items("cosine_spearman", score, {"default/test": part})
    drawn = generator.integers(20, size=20)
    expected = spearmanr(similarities[drawn], judged[drawn]).statistic
    assert items.statistic(np.bincount(drawn, minlength=20)[None])[0] == pytest.approx(expected)


def test_spearman_of_several_subsets_is_the_mean_of_theirs() -> None:
    generator = np.random.default_rng(0)
    parts, expected = {}, []
    for language, pairs in (("de/test", 20), ("en/test", 6)):
        judged, similarities = generator.random(pairs).round(1), generator.random(pairs)
        parts[language] = SimilarityPart(list(similarities), list(judged), [f"a ↔ {n}" for n in range(pairs)])
        expected.append(spearmanr(similarities, judged).statistic)
    items = mteb_items("cosine_spearman", float(np.mean(expected)), parts)
    assert items.items == 26
    assert items.by_item().names[19:21] == ["de/test 19", "en/test 0"]
    # A draw may leave a subset out; what is drawn of the other counts as it does alone.
    drawn = np.bincount(generator.integers(20, size=26), minlength=26)
    alone = mteb_items("cosine_spearman", expected[0], {"de/test": parts["de/test"]})
    assert items.statistic(drawn[None])[0] == pytest.approx(alone.statistic(drawn[None, :20])[0] / 2)
    low, high = items.intervals()["cosine_spearman"]
    assert low < np.mean(expected) < high
    mixed = {"de/test": parts["de/test"], "en/test": ClassPart([[0, 1]], [0, 1], ["a", "b"])}
    assert mteb_items("cosine_spearman", 0.5, mixed) is None


def right_and_wrong(right: set[int], items: int) -> ClassPart:
    return ClassPart([[int(n in right) for n in range(items)]], [1] * items, [f"text {n}" for n in range(items)])


@pytest.fixture
def scores() -> dict[str, list[MtebScore]]:
    """Two models on a task whose items are known and on one where they are not."""
    found: dict[str, list[MtebScore]] = {}
    for name, right in (("first", set(range(20))), ("second", set(range(1, 40)))):
        part = right_and_wrong(right, 50)
        items = mteb_items("accuracy", len(right) / 50, {"default/test": part})
        found[name] = [MtebScore("Topics", "accuracy", len(right) / 50, items), MtebScore("Groups", "v_measure", 0.5)]
    return found


def test_two_models_are_compared_by_paired_bootstrap(scores: dict[str, list[MtebScore]]) -> None:
    found = mteb_as_dict(scores, {"first": 128, "second": None})
    assert [row["model"] for row in found["mteb"]] == ["first", "second"]
    assert found["mteb"][1]["scores"][0] == {"task": "Topics", "metric": "accuracy", "score": 0.78}
    assert [row["max_seq_length"] for row in found["mteb"]] == [128, None]
    topics, groups = found["comparisons"]
    change: dict[str, Any] = topics["metrics"]["accuracy"]
    expected = paired_bootstrap(*(score[0].items.by_item().scores for score in scores.values()))
    assert (change["low"], change["high"], change["p_value"]) == (expected.low, expected.high, expected.p_value)
    assert change["verdict"] == "better"
    assert (topics["wins"], topics["losses"], topics["ties"]) == (20, 1, 29)
    assert topics["regressions"][0]["text"] == "text 0"
    assert groups == {"before": "first", "after": "second", "task": "Groups", "significance": NOT_KNOWN}


def test_the_tables_say_what_is_not_known(
    scores: dict[str, list[MtebScore]], capsys: pytest.CaptureFixture[str]
) -> None:
    show_mteb(scores, {"first": 128, "second": None}, make_console())
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "Topics accuracy 0.4000 0.7800" in lines
    assert any(line.startswith("Topics 50 +0.3800 +0.2") and line.endswith("20 1 better") for line in lines)
    assert "texts up to 128 tokens no limit" in lines
    assert "Groups +0.0000 not known" in lines
    assert lines[-1] == f"{NOT_KNOWN}."
    show_mteb({"first": scores["first"]}, {"first": 128}, make_console())
    assert "not known" not in capsys.readouterr().out


def test_what_cannot_be_compared(scores: dict[str, list[MtebScore]]) -> None:
    topics, groups = scores["first"]
    with pytest.raises(DataError, match="Topics and Groups are different tasks"):
        topics.compared_with(groups)
    other = mteb_items("accuracy", 1.0, {"default/test": right_and_wrong(set(range(51)), 51)})
    with pytest.raises(DataError, match="different data"):
        topics.compared_with(MtebScore("Topics", "accuracy", 1.0, other))
