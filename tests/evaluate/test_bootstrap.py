import numpy as np
import pytest
from scipy import stats

from embtune.errors import ArgumentError, DataError
from embtune.evaluate import bootstrap as bootstrap_module
from embtune.evaluate.bootstrap import Difference, draws, paired_bootstrap


def scores(items: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    before = generator.random(items)
    return before, before + generator.normal(0.03, 0.2, items)


def test_interval_agrees_with_scipy() -> None:
    before, after = scores(200)
    ours = paired_bootstrap(before, after, samples=20_000)
    theirs = stats.bootstrap(
        (after, before),
        lambda x, y, axis: (x - y).mean(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert ours.difference == pytest.approx(np.mean(after - before))
    assert (ours.before, ours.after) == pytest.approx((before.mean(), after.mean()))
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=1e-3)


def test_p_value_is_near_that_of_a_t_test() -> None:
    before, after = scores(200)
    assert paired_bootstrap(before, after).p_value == pytest.approx(stats.ttest_rel(after, before).pvalue, abs=0.01)


def test_interval_covers_the_true_difference_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(300):
        difference = paired_bootstrap(*scores(60, seed), samples=400, confidence=0.9, seed=seed)
        covered += difference.low <= 0.03 <= difference.high
    assert 0.84 <= covered / 300 <= 0.95


def test_significant_means_that_zero_is_outside() -> None:
    rng = np.random.default_rng(0)
    before = rng.random(100)
    better = paired_bootstrap(before, before + 0.1 + 0.05 * rng.standard_normal(100))
    assert better.significant
    assert better.verdict == "better"
    assert better.low > 0
    assert better.p_value == pytest.approx(2 / 10_001)
    worse = paired_bootstrap(before + 0.1, before)
    assert worse.verdict == "worse"
    unclear = paired_bootstrap(before, rng.permutation(before))
    assert unclear.low < 0 < unclear.high
    assert unclear.verdict == "no clear change"


def test_equal_scores_are_no_change() -> None:
    before, _ = scores(50)
    same = paired_bootstrap(before, before.copy())
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    assert not same.significant


def test_five_items_are_never_significant_and_six_may_be() -> None:
    assert not paired_bootstrap([0.0] * 5, [1.0] * 5).significant
    assert paired_bootstrap([0.0] * 6, [1.0] * 6).significant
    assert not paired_bootstrap([0.0] * 6, [1.0] * 6, confidence=0.99).significant


def test_same_seed_same_result_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = scores(70)
    whole = paired_bootstrap(before, after, samples=1000)
    assert whole == paired_bootstrap(before, after, samples=1000)
    assert whole != paired_bootstrap(before, after, samples=1000, seed=1)
    monkeypatch.setattr(bootstrap_module, "COUNTS_PER_BLOCK", 700)
    assert paired_bootstrap(before, after, samples=1000).low == pytest.approx(whole.low)


def test_draws_are_counts_of_all_items_in_bounded_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap_module, "COUNTS_PER_BLOCK", 1000)
    blocks = list(draws(items=30, samples=100, seed=0))
    assert max(block.size for block in blocks) <= 1000
    counts_SN = np.concatenate(blocks)
    assert counts_SN.shape == (100, 30)
    assert (counts_SN.sum(axis=1) == 30).all()
    assert len(np.unique(counts_SN, axis=0)) == 100
    assert counts_SN.mean(axis=0) == pytest.approx(np.ones(30), abs=0.4)


def test_dict_is_complete() -> None:
    difference = Difference(0.5, 0.6, 0.1, 0.05, 0.15, 0.001, 0.95, 100, 1000)
    assert difference.to_dict() == {
        "before": 0.5,
        "after": 0.6,
        "difference": 0.1,
        "low": 0.05,
        "high": 0.15,
        "p_value": 0.001,
        "confidence": 0.95,
        "items": 100,
        "samples": 1000,
        "significant": True,
        "verdict": "better",
    }


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([0.1, 0.2], [0.1], "before has 2 items and after has 1"),
        ([], [], "before must be a flat list"),
        ([0.1], [0.2], "at least two items"),
        ([0.1, float("nan")], [0.1, 0.2], r"before\[1\] is not a finite number"),
        ([0.1, 0.2], ["a", "b"], "after must be a flat list of numbers"),
        ([[0.1, 0.2]], [[0.1, 0.2]], "before must be a flat list"),
    ],
)
def test_wrong_scores_are_refused(before: list, after: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        paired_bootstrap(before, after)


@pytest.mark.parametrize("setting", [{"samples": 10}, {"confidence": 95}, {"confidence": 0}])
def test_wrong_settings_are_refused_by_name(setting: dict) -> None:
    with pytest.raises(ArgumentError, match=next(iter(setting))):
        paired_bootstrap([0.1, 0.2], [0.2, 0.3], **setting)
