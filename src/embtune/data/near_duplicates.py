"""Keeping one text of every group of near-identical ones."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

_WORD = re.compile(r"\w+")


def word_set(text: str) -> frozenset[str]:
    """The distinct words of `text` in lower case, punctuation left out."""
    return frozenset(_WORD.findall(text.lower()))


def distinct_rows(rows: Sequence[tuple[str, ...]], threshold: float = 0.8) -> list[int]:
    """Positions of the rows to keep, in order: a row goes if any of its texts is close to that column's in a kept row.

    Two texts are close when the Jaccard similarity of their word sets, |A ∩ B| / |A ∪ B|, reaches `threshold`
    (0 < threshold ≤ 1). The search is exact, with the prefix filter of Chaudhuri, Ganti and Kaushik, "A Primitive
    Operator for Similarity Joins in Data Cleaning" (2006): close sets share one of their rarest words, so only texts
    that share such a word are compared.
    """
    if not rows:
        return []
    columns = [_CloseSets([word_set(row[column]) for row in rows], threshold) for column in range(len(rows[0]))]
    kept = []
    for position in range(len(rows)):
        if not any(column.has_close(position) for column in columns):
            kept.append(position)
            for column in columns:
                column.add(position)
    return kept


class _CloseSets:
    """The sets added so far, indexed by their rarest words."""

    def __init__(self, sets: list[frozenset[str]], threshold: float) -> None:
        frequency = Counter(word for words in sets for word in words)
        self.sets = sets
        self.threshold = threshold
        self.index: dict[str, list[int]] = defaultdict(list)
        self.prefixes = [self._prefix(words, frequency) for words in sets]

    def _prefix(self, words: frozenset[str], frequency: Counter[str]) -> list[str]:
        rarest_first = sorted(words, key=lambda word: (frequency[word], word))
        return rarest_first[: len(words) - math.ceil(self.threshold * len(words)) + 1]

    def has_close(self, position: int) -> bool:
        words = self.sets[position]
        candidates = {other for word in self.prefixes[position] for other in self.index[word]}
        return any(self._jaccard(words, self.sets[other]) >= self.threshold for other in candidates)

    def add(self, position: int) -> None:
        for word in self.prefixes[position]:
            self.index[word].append(position)

    @staticmethod
    def _jaccard(first: frozenset[str], second: frozenset[str]) -> float:
        common = len(first & second)
        return common / (len(first) + len(second) - common)
