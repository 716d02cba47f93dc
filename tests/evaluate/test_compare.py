import json
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from sentence_transformers import SentenceTransformer

import embtune.evaluate
from embtune.data.retrieval import RetrievalData
from embtune.errors import ArgumentError, DataError
from embtune.evaluate import (
    Comparison,
    RetrievalResult,
    compare,
    evaluate_classification,
    evaluate_clustering,
    evaluate_retrieval,
    evaluate_sts,
)
from embtune.evaluate.result import EvaluationResult

WORDS = ["bread", "river", "guitar", "winter", "doctor", "engine", "forest", "letter", "pencil", "rocket"]
MORE = ["red", "old", "loud", "cheap"]
PAIRS = [(adjective, word) for adjective in MORE for word in WORDS]
DATA = RetrievalData(
    {f"q{i}": f"[bold]where is the\n{adjective} {word}?" for i, (adjective, word) in enumerate(PAIRS)},
    {f"d{i}": f"{word}, {adjective}, can be found here" for i, (adjective, word) in enumerate(PAIRS)},
    {f"q{i}": {f"d{i}"} for i in range(40)},
)


@pytest.fixture(scope="module")
def minilm(minilm_dir: Path) -> SentenceTransformer:
    return SentenceTransformer(str(minilm_dir), device="cpu")


@pytest.fixture(scope="module")
def tiny(tiny_dir: Callable[..., Path]) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_dir("bert")), device="cpu")


@pytest.fixture(scope="module")
def good(minilm: SentenceTransformer) -> RetrievalResult:
    return evaluate_retrieval(minilm, DATA, k=3)


@pytest.fixture(scope="module")
def bad(tiny: SentenceTransformer) -> RetrievalResult:
    return evaluate_retrieval(tiny, DATA, k=3)


@pytest.fixture(scope="module")
def comparison(good: RetrievalResult, bad: RetrievalResult) -> Comparison:
    return compare(good, bad)


def test_a_worse_model_is_worse(comparison: Comparison, good: RetrievalResult, bad: RetrievalResult) -> None:
    assert list(comparison.metrics) == ["ndcg@3", "mrr@3", "recall@3"]
    change = comparison.metrics["ndcg@3"]
    assert change.verdict == "worse"
    assert comparison.significant
    assert (change.before, change.after) == (good.metrics["ndcg@3"], bad.metrics["ndcg@3"])
    assert change.low < change.difference < change.high < 0


def test_wins_losses_and_ties_count_every_query(
    comparison: Comparison, good: RetrievalResult, bad: RetrievalResult
) -> None:
    change = bad.ndcg - good.ndcg
    assert comparison.losses == (change < 0).sum() > 5
    assert comparison.wins == (change > 0).sum()
    assert comparison.wins + comparison.losses + comparison.ties == 40
    differences = [item.difference for item in comparison.regressions]
    assert differences == sorted(differences)
    assert differences[0] == pytest.approx(change.min())
    worst = comparison.regressions[0]
    assert worst.text == DATA.queries[worst.item]
    assert worst.before == good.ndcg[list(DATA.queries).index(worst.item)]


def test_the_other_way_round_is_the_mirror_image(
    comparison: Comparison, good: RetrievalResult, bad: RetrievalResult
) -> None:
    mirror = compare(bad, good)
    assert mirror.metrics["mrr@3"].verdict == "better"
    assert mirror.metrics["mrr@3"].low == pytest.approx(-comparison.metrics["mrr@3"].high)
    assert mirror.improvements[0].difference == pytest.approx(-comparison.regressions[0].difference)
    assert mirror.wins == comparison.losses


def test_the_same_model_is_a_tie(good: RetrievalResult, minilm: SentenceTransformer) -> None:
    same = compare(good, evaluate_retrieval(minilm, DATA, k=3))
    assert (same.wins, same.losses, same.ties) == (0, 0, 40)
    assert not same.significant
    assert all(change.p_value == 1 for change in same.metrics.values())
    assert "Down the most" not in str(same)


def test_text_shows_everything_a_reader_needs(comparison: Comparison) -> None:
    text = str(comparison)
    lines = text.splitlines()
    assert "retrieval, 40 items" in lines[0]
    change = comparison.metrics["ndcg@3"]
    row = next(line for line in lines if line.startswith("ndcg@3 "))
    for number in (change.before, change.after):
        assert f"{number:.4f}" in row
    assert f"{change.difference:+.4f}" in row
    assert f"{change.low:+.4f} to {change.high:+.4f}" in row
    assert row.endswith("worse")
    assert f"{comparison.losses} down" in text
    assert f"{comparison.regressions[0].item}: [bold]where is the " in text
    assert "\x1b" not in text
    assert all(len(line) <= 120 for line in lines)


def test_table_has_colours_on_a_terminal(comparison: Comparison) -> None:
    out = StringIO()
    Console(file=out, force_terminal=True, width=120).print(comparison)
    assert "\x1b[31m" in out.getvalue()
    quiet = StringIO()
    Console(file=quiet, width=120).print(comparison.render(regressions=0))
    assert "Down the most" not in quiet.getvalue()


def test_few_items_are_pointed_out(minilm: SentenceTransformer) -> None:
    few = RetrievalData({"q0": "bread", "q1": "river"}, {"a": "bread", "b": "river"}, {"q0": {"a"}, "q1": {"b"}})
    result = evaluate_retrieval(minilm, few)
    assert "Only 2 items" in str(compare(result, result))


def test_dict_is_json(comparison: Comparison) -> None:
    loaded = json.loads(json.dumps(comparison.to_dict()))
    assert loaded["metrics"]["ndcg@3"]["verdict"] == "worse"
    assert loaded["wins"] + loaded["losses"] + loaded["ties"] == 40
    assert loaded["regressions"][0] == {
        "item": comparison.regressions[0].item,
        "text": comparison.regressions[0].text,
        "before": comparison.regressions[0].before,
        "after": comparison.regressions[0].after,
    }


def test_every_kind_compares(minilm: SentenceTransformer, tiny: SentenceTransformer) -> None:
    texts = [f"{adjective} {word}" for word in WORDS for adjective in MORE]
    labels = [word for word in WORDS for _ in MORE]
    scores = np.linspace(0, 1, 40)
    evaluations: dict[str, Callable[[SentenceTransformer], EvaluationResult]] = {
        "sts": lambda model: evaluate_sts(model, texts, texts[::-1], scores),
        "clustering": lambda model: evaluate_clustering(model, texts, labels, runs=2),
        "classification": lambda model: evaluate_classification(model, texts, labels, texts, labels),
    }
    for kind, evaluate in evaluations.items():
        before, after = evaluate(minilm), evaluate(tiny)
        comparison = compare(before, after, samples=500)
        assert comparison.kind == kind
        for metric, change in comparison.metrics.items():
            assert change.difference == pytest.approx(after.metrics[metric] - before.metrics[metric])
            assert change.low <= change.high
        assert json.dumps(comparison.to_dict())
        assert kind in str(comparison)
        assert ("wins" in comparison.to_dict()) == (kind != "clustering")


def test_different_kinds_are_refused(good: RetrievalResult, minilm: SentenceTransformer) -> None:
    sts = evaluate_sts(minilm, WORDS[:3], WORDS[3:6], [1, 2, 3])
    with pytest.raises(ArgumentError, match="retrieval result and after is a sts result"):
        compare(good, sts)


def test_different_k_is_refused(good: RetrievalResult, minilm: SentenceTransformer) -> None:
    with pytest.raises(ArgumentError, match="same k"):
        compare(good, evaluate_retrieval(minilm, DATA, k=4))


@pytest.mark.parametrize("part", ["queries", "corpus", "relevant"])
def test_different_data_is_refused(good: RetrievalResult, tiny: SentenceTransformer, part: str) -> None:
    changes = {
        "queries": {**DATA.queries, "q0": "something else"},
        "corpus": {**DATA.corpus, "d0": "something else"},
        "relevant": {**DATA.relevant, "q0": {"d1"}},
    }
    other = evaluate_retrieval(tiny, replace(DATA, **{part: changes[part]}), k=3)
    with pytest.raises(DataError, match="different data"):
        compare(good, other)


def test_one_query_is_too_few(minilm: SentenceTransformer) -> None:
    result = evaluate_retrieval(minilm, RetrievalData({"q": "bread"}, {"d": "bread"}, {"q": {"d"}}))
    with pytest.raises(DataError, match="at least two items"):
        compare(result, result)


def test_public_names_exist() -> None:
    for name in embtune.evaluate.__all__:
        assert hasattr(embtune.evaluate, name)
