"""Finding texts that are nearly the same: those whose words are."""

import math
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

_WORD = re.compile(r"\w+")
_ROUNDING = 1e-9  # 0.55 of 20 words is 11, and 11.000000000000002 to a computer


def word_set(text: str) -> frozenset[str]:
    """The distinct words of `text` in lower case, punctuation left out."""
    return frozenset(_WORD.findall(text.lower()))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """|A ∩ B| / |A ∪ B|; 0 where both are empty, for nothing is known of texts without words."""
    common = len(first & second)
    return common / (len(first) + len(second) - common) if common else 0.0


def distinct_rows(rows: Sequence[tuple[str, ...]], threshold: float = 0.8) -> list[int]:
    """Positions of the rows to keep, in order: a row goes if any of its texts is close to that column's in a kept row.

    Two texts are close when the Jaccard similarity of their word sets, |A ∩ B| / |A ∪ B|, reaches `threshold`
    (0 < threshold ≤ 1).
    """
    columns = [CloseTexts(column, threshold) for column in zip(*rows, strict=True)]
    kept = []
    for position in range(len(rows)):
        if not any(True for column in columns for _ in column.close(position)):
            kept.append(position)
            for column in columns:
                column.add(position)
    return kept


def near_copies(
    columns: Iterable[Iterable[str]], threshold: float = 0.8, labels: Sequence[Any] | None = None
) -> dict[int, int]:
    """Rows that nearly repeat an earlier one: each of their texts is close to that column's in the same earlier row.

    Args:
        columns: the texts of each column, all of one length.
        threshold: as for `distinct_rows`.
        labels: one for each row; rows that differ in it never repeat each other.

    Returns:
        The row's position and that of the first kept row that it repeats.
    """
    indexes = [CloseTexts(column, threshold) for column in columns]
    copies: dict[int, int] = {}
    for position in range(len(indexes[0])):
        # Whichever column has fewer texts to compare with goes first; what it finds is compared in the others.
        first, *others = sorted(indexes, key=lambda texts: texts.work(position))
        close = (each for each in first.close(position) if labels is None or labels[each] == labels[position])
        earlier = min(
            (each for each in close if all(other.are_close(position, each) for other in others)), default=None
        )
        if earlier is not None:
            copies[position] = earlier
            continue
        for index in indexes:
            index.add(position)
    return copies


class CloseTexts:
    """Finds, among the texts added so far, those that are close to another one.

    The search is exact, with the prefix filter of Chaudhuri, Ganti and Kaushik, "A Primitive Operator for Similarity
    Joins in Data Cleaning" (2006): close sets share one of their rarest words, so only texts that share such a word
    are compared. Texts without words are close to none.

    Args:
        texts: all texts that will be added or asked about; a position counts them from 0.
        threshold: Jaccard similarity of the word sets from which two texts are close (0 < threshold ≤ 1).
    """

    def __init__(self, texts: Iterable[str], threshold: float) -> None:
        self._threshold = threshold
        numbers: dict[str, int] = {}
        # Numbers instead of words: a set of strings takes twenty times the memory.
        self._sets = [
            array("I", sorted(numbers.setdefault(word, len(numbers)) for word in word_set(text))) for text in texts
        ]
        self._frequency = Counter(number for words in self._sets for number in words)
        self._index: dict[int, list[int]] = defaultdict(list)

    def __len__(self) -> int:
        return len(self._sets)

    def add(self, position: int) -> None:
        """Make a text one that others can be close to."""
        for word in self._rarest(position):
            self._index[word].append(position)

    def close(self, position: int) -> Iterator[int]:
        """The added texts that are close to a text."""
        words = set(self._sets[position])
        candidates = {other for word in self._rarest(position) for other in self._index.get(word, ())}
        return (other for other in candidates if self._reaches(words, self._sets[other]))

    def work(self, position: int) -> int:
        """How many texts, at most, `close` would compare a text with."""
        return sum(len(self._index.get(word, ())) for word in self._rarest(position))

    def are_close(self, position: int, other: int) -> bool:
        """Whether the word sets of two texts reach the threshold."""
        return self._reaches(set(self._sets[position]), self._sets[other])

    def _reaches(self, words: set[int], others: Sequence[int]) -> bool:
        shorter, longer = sorted((len(words), len(others)))
        if shorter < self._threshold * longer - _ROUNDING:
            return False
        common = len(words.intersection(others))
        return bool(common) and common / (shorter + longer - common) >= self._threshold

    def _rarest(self, position: int) -> list[int]:
        words = self._sets[position]
        rarest_first = sorted(words, key=lambda word: (self._frequency[word], word))
        return rarest_first[: len(words) - math.ceil(self._threshold * len(words) - _ROUNDING) + 1]
