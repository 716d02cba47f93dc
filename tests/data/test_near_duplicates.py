"""The search for near duplicates, against comparing everything with everything."""

import random

import pytest

from embtune.data.near_duplicates import CloseTexts, jaccard, near_copies, word_set

WORDS = [f"w{number}" for number in range(30)]


def rows(seed: int) -> list[tuple[str, str]]:
    """Rows that differ from an earlier one in a word or two, in one column or both."""
    chance = random.Random(seed)
    made = [(" ".join(chance.sample(WORDS, 6)), " ".join(chance.sample(WORDS, 20))) for _ in range(40)]
    for short, long in [*made]:
        longer = f"{long} more"
        made += [(short.upper(), longer), (f"{short}!", " ".join(chance.sample(WORDS, 20))), (f"{short} x y", long)]
    chance.shuffle(made)
    return [*made, ("?", "!"), ("?", "!")]


@pytest.mark.parametrize("threshold", [0.55, 0.8, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_near_copies_equals_comparing_everything_with_everything(seed: int, threshold: float) -> None:
    data = rows(seed)
    expected: dict[int, int] = {}
    for position, row in enumerate(data):
        kept = (other for other in range(position) if other not in expected)
        close = (
            other
            for other in kept
            if all(jaccard(word_set(a), word_set(b)) >= threshold for a, b in zip(row, data[other], strict=True))
        )
        earlier = next(close, None)
        if earlier is not None:
            expected[position] = earlier
    assert bool(expected) == (threshold < 1)
    assert near_copies(zip(*data, strict=True), threshold) == expected


def test_a_threshold_that_rounds_badly() -> None:
    # 11 of 20 words are 0.55 of them, although 0.55 * 20 is 11.000000000000002.
    whole, part = " ".join(WORDS[:20]), " ".join(WORDS[:11])
    texts = CloseTexts([whole, part], 0.55)
    texts.add(0)
    assert list(texts.close(1)) == [0]


def test_texts_without_words_are_close_to_none() -> None:
    assert near_copies([["?!", "?!", ""]]) == {}
    assert jaccard(word_set("?!"), word_set("?!")) == 0.0


def test_rows_of_different_labels_never_repeat_each_other() -> None:
    texts = ["a b", "b a", "a, b", "b, a"]
    assert near_copies([texts]) == {1: 0, 2: 0, 3: 0}
    assert near_copies([texts], labels=[0, 1, 0, 1]) == {2: 0, 3: 1}
