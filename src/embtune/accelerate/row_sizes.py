"""How far rows are filled up so that few CUDA graphs serve a run: chosen from the lengths of its texts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

GRAIN = 256
"""Steps are multiples of so many tokens, which suits every kernel's tiles."""

UNKNOWN = 1024
"""The step where lengths are not known before the run."""

# On the H200, recording BERT-base's step took 0.2 s: 5 of its steps on medquad, 20 on nl2bash.
_RECORDING = 10
# At most an eighth of the tokens fills up, on average, however short the run.
_LARGEST = 1 / 4
# Recordings are bounded, and the last batch of an epoch or a longer text takes one too.
_MOST = 8
_DRAWS = 256


@dataclass(frozen=True)
class RowSizes:
    """What batches are filled up to, and what that costs."""

    step: int
    """Rows are filled up to a multiple of so many tokens."""
    count: int
    """Sizes that full batches are expected to have."""
    filler: float
    """Expected share of tokens that only fill up."""

    def describe(self) -> str:
        """A few words for the user."""
        return f"filled up to multiples of {self.step:,} tokens: {self.filler:.1%} of each, {self.count} sizes expected"


def choose_row_sizes(lengths: Sequence[np.ndarray], batch: int, steps: int) -> RowSizes:
    """The step that costs a run least: a larger one fills up more in every step, a smaller one records more sizes.

    With batches of m tokens on average that differ by s, recording costs (s / step) · r, with r the steps that one
    recording takes as long as, and filling up costs steps · step / 2m. Their sum is least at √(2 · s · r · m / steps).
    No more than eight sizes, and no more filler than an eighth where so many suffice.

    Args:
        lengths: tokens of each row, all its texts together; an array [rows] for each data set.
        batch: rows in a batch.
        steps: of the run.
    """
    generator = np.random.default_rng(0)
    rows = sum(map(len, lengths))
    totals = np.concatenate(
        [generator.choice(each, (math.ceil(_DRAWS * len(each) / rows), batch)).sum(axis=1) for each in lengths]
    )
    mean, span = float(totals.mean()), float(np.ptp(totals))
    best = max(min(math.sqrt(2 * span * _RECORDING * mean / max(1, steps)), _LARGEST * mean), span / _MOST)
    step = max(1, math.ceil(best / GRAIN)) * GRAIN
    sizes = np.ceil(totals / step)
    return RowSizes(step, len(np.unique(sizes)), float(1 - mean / (sizes.mean() * step)))
