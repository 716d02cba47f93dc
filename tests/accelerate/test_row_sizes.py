"""How far rows are filled up, from the lengths of the texts."""

import numpy as np
import pytest

from embtune.accelerate.row_sizes import GRAIN, choose_row_sizes


def lengths(mean: float, spread: float, rows: int = 5000) -> np.ndarray:
    return np.random.default_rng(1).normal(mean, spread, rows).clip(4).astype(np.int64)


@pytest.mark.parametrize("steps", [1, 30, 1000, 10**6])
@pytest.mark.parametrize(("mean", "spread", "batch"), [(210, 150, 128), (45, 15, 128), (300, 100, 8), (30, 0, 4)])
def test_sizes_are_few_and_fill_up_little(steps: int, mean: float, spread: float, batch: int) -> None:
    sizes = choose_row_sizes([lengths(mean, spread)], batch, steps)
    assert sizes.step % GRAIN == 0
    assert 1 <= sizes.count <= 9
    assert 0 <= sizes.filler <= max(0.14, sizes.step / (mean * batch))


def test_a_longer_run_is_filled_up_less() -> None:
    [short, long] = [choose_row_sizes([lengths(210, 150)], 128, steps) for steps in (50, 20_000)]
    assert long.step < short.step
    assert long.filler < short.filler
    assert long.count > short.count


def test_several_data_sets_count_by_their_rows() -> None:
    long, short = lengths(200, 0), lengths(40, 0, rows=500)
    apart = [choose_row_sizes([each], 64, 10_000).count for each in (long, short)]
    assert apart == [1, 1]
    assert choose_row_sizes([long, short], 64, 10_000).count == 2


def test_it_says_what_it_costs() -> None:
    sizes = choose_row_sizes([lengths(210, 150)], 128, 1000)
    assert f"multiples of {sizes.step:,} tokens" in sizes.describe()
    assert f"{sizes.count} sizes" in sizes.describe()
