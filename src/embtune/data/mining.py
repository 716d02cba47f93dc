"""Hard negatives: texts that the model ranks high for an anchor although they do not answer it.

Shapes: A anchors.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import pyarrow as pa
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from embtune.data.candidates import Candidates, Search, choose_search, rank_candidates
from embtune.data.columns import ColumnRoles, as_option, canonical
from embtune.data.mining_rules import NEAR_DUPLICATE, MiningRules
from embtune.data.near_duplicates import jaccard, word_set
from embtune.data.same_text import digest, normal
from embtune.data.tables import to_dataset
from embtune.errors import ArgumentError, DataError
from embtune.runtime import package_version


@dataclass(frozen=True)
class MinedNegatives:
    """Rows with negatives, ready to be trained on, and what was left out on the way."""

    dataset: Dataset
    """anchor, positive and negatives, in the order of the rows they were mined for."""
    rows: int
    """Rows that negatives were looked for."""
    documents: int
    """Different texts that were searched."""
    too_few: int
    """Rows that are left out because fewer than `num_negatives` were found; of triplets, none at all."""
    dropped: dict[str, int]
    """Why candidates were skipped, and how many; counted up to the last negative that a row needed."""
    positive_score: float
    """Mean similarity of anchor and positive, over the rows of `dataset`."""
    negative_score: float
    """Mean similarity of anchor and negative."""
    search: Literal["torch", "faiss"]
    """What searched."""

    def __str__(self) -> str:
        lines = [
            f"{len(self.dataset):,} rows with {', '.join(self.dataset.column_names)}, from {self.rows:,} rows and "
            f"{self.documents:,} documents. Exact search by {_named(self.search)}.",
            f"Similarity to the anchor: positives {self.positive_score:.3f} on average, negatives "
            f"{self.negative_score:.3f}.",
        ]
        lines += [f"{count:,} candidates skipped: {reason}." for reason, count in self.dropped.items()]
        if self.too_few:
            lines.append(
                f"{self.too_few:,} rows left out: too few candidates remained. Fewer negatives, a larger range_max or "
                "looser limits keep more."
            )
        return "\n".join(lines)


def _named(search: Literal["torch", "faiss"]) -> str:
    if search == "torch":
        return "PyTorch"
    version = package_version("faiss-cpu")  # a faiss of another distribution, conda's say, names none
    return f"faiss {version}" if version else "faiss"


def mine_hard_negatives(
    pairs: Dataset,
    model: SentenceTransformer,
    rules: MiningRules | None = None,
    *,
    corpus: Sequence[str] = (),
    output_format: Literal["n-tuple", "triplet"] = "n-tuple",
    batch_size: int = 64,
    chunk: int = 2048,
    search: Search = "auto",
    show_progress: bool = False,
) -> MinedNegatives:
    """Find hard negatives for each pair among the positives of other anchors, and in `corpus`.

    The search is exact and goes through the documents block by block: memory holds the texts, the anchors'
    embeddings and one block of documents'. Texts that differ in case, white space or Unicode form only count as one,
    and an anchor that occurs in several rows has all of their positives. The same input gives the same rows: what
    scores equally ranks by its position, positives before `corpus`.

    Args:
        pairs: rows of anchor and positive.
        model: ranks the documents; anchors go through its `encode_query`, documents through `encode_document`.
        rules: which candidates become negatives; None is `MiningRules()`.
        corpus: more texts to search.
        output_format: "n-tuple" gives a row for each pair, with `negative_1` to `negative_n`: each text is encoded once
            a step, and no batch holds an anchor twice by our doing. "triplet" gives a row for each negative, so that
            pairs with fewer negatives than asked for are kept.
        batch_size: texts encoded at a time.
        chunk: documents encoded and searched at a time; memory grows with it.
        search: what multiplies the blocks; both give the same rows. "auto" is PyTorch, the faster one as measured
            (docs/decisions.md); "faiss" multiplies on the CPU.

    Raises:
        DataError: `pairs` is empty, has no anchor and positive or more than that, or no row got enough negatives.
        ArgumentError: an option is out of its range, or faiss is asked for and does not know the model's similarity.
        MissingPackageError: faiss is asked for and not installed.
    """
    rules = rules or MiningRules()
    for name, value in (("batch_size", batch_size), ("chunk", chunk)):
        if value < 1:
            raise ArgumentError(f"{name}={value} must be at least 1.")
    if output_format not in ("n-tuple", "triplet"):
        raise ArgumentError(f"output_format={output_format!r} must be 'n-tuple' or 'triplet'.")
    chosen = choose_search(search, model)
    task = _Task.of(_checked(pairs), corpus)
    excluded = sorted(task.excluded(), key=lambda pair: pair[1])
    candidates = rank_candidates(
        model,
        task.anchors,
        task.documents,
        excluded,
        keep=rules.last_rank,
        batch_size=batch_size,
        chunk=chunk,
        search=chosen,
        show_progress=show_progress,
    )
    known = dict(zip(excluded, candidates.excluded_P.tolist(), strict=True))
    return _collect(task, known, candidates, rules, output_format, chosen)


def _checked(pairs: Dataset) -> Dataset:
    if not len(pairs):
        raise DataError("There are no pairs to mine negatives for.")
    roles = ColumnRoles.from_names(pairs.column_names).roles
    if roles != ("anchor", "positive"):
        raise DataError(
            f"Negatives are mined for the columns anchor and positive alone, not {', '.join(roles)}. Choose two "
            f"columns: {as_option({'its_name': 'anchor', 'another': 'positive'})}."
        )
    return canonical(pairs)


@dataclass(frozen=True)
class _Task:
    """Rows as numbers: which anchor, and which document is its positive."""

    pairs: Dataset
    anchors: list[str]
    """The different anchors (A)."""
    documents: list[str]
    """The different positives, then the rest of the corpus."""
    rows: list[tuple[int, int]]
    """Anchor and positive of each row."""
    positives: list[dict[int, None]]
    """All positives of each anchor, as keys: without repeats and in order (A)."""
    itself: list[int | None]
    """The document that is the anchor's own text, if there is one (A)."""

    @classmethod
    def of(cls, pairs: Dataset, corpus: Sequence[str]) -> "_Task":
        anchors, documents = _Distinct(), _Distinct()
        rows = [(anchors.number(row["anchor"]), documents.number(row["positive"])) for row in _plain(pairs)]
        for text in corpus:
            documents.number(text)
        positives: list[dict[int, None]] = [{} for _ in anchors.texts]
        for anchor, positive in rows:
            positives[anchor][positive] = None
        itself = [documents.numbers.get(key) for key in anchors.numbers]
        return cls(pairs, anchors.texts, documents.texts, rows, positives, itself)

    def excluded(self) -> Iterator[tuple[int, int]]:
        """Anchor and document of every pair that can be no negative."""
        for anchor, (positives, itself) in enumerate(zip(self.positives, self.itself, strict=True)):
            yield from ((anchor, positive) for positive in positives)
            if itself is not None and itself not in positives:
                yield anchor, itself


def _plain(pairs: Dataset) -> Iterator[dict[str, str]]:
    return iter(pairs.with_format(None))


class _Distinct:
    """Numbers texts in the order in which they first occur."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.numbers: dict[bytes, int] = {}

    def number(self, text: str) -> int:
        number = self.numbers.setdefault(digest(normal(text)), len(self.texts))
        if number == len(self.texts):
            self.texts.append(text)
        return number


class _NearDuplicates:
    """Whether a document is nearly one of the texts that answer an anchor."""

    def __init__(self, task: _Task, threshold: float) -> None:
        self._task = task
        self._threshold = threshold
        # Rows of one anchor mostly follow each other.
        self._known = lru_cache(maxsize=64)(self._word_sets)

    def _word_sets(self, anchor: int) -> list[frozenset[str]]:
        positives = (self._task.documents[positive] for positive in self._task.positives[anchor])
        return [word_set(text) for text in (self._task.anchors[anchor], *positives)]

    def __call__(self, anchor: int, document: int) -> bool:
        words = word_set(self._task.documents[document])
        return any(jaccard(words, other) >= self._threshold for other in self._known(anchor))


def _collect(
    task: _Task,
    positive_scores: Mapping[tuple[int, int], float],
    candidates: Candidates,
    rules: MiningRules,
    output_format: str,
    search: Literal["torch", "faiss"],
) -> MinedNegatives:
    is_near = _NearDuplicates(task, rules.near_duplicates)
    dropped: Counter[str] = Counter()
    chosen: list[tuple[int, list[int]]] = []
    sums = [0.0, 0.0]
    found = 0
    least = rules.num_negatives if output_format == "n-tuple" else 1
    for row, (anchor, positive) in enumerate(task.rows):
        positive_score = positive_scores[anchor, positive]
        negatives: dict[int, float] = {}
        for document, score in candidates.of(anchor, rules.range_min):
            reason = rules.objection(score, positive_score)
            if reason is None and is_near(anchor, document):
                reason = NEAR_DUPLICATE
            if reason is not None:
                dropped[reason] += 1
                continue
            negatives[document] = score
            if len(negatives) == rules.num_negatives:
                break
        if len(negatives) >= least:
            chosen.append((row, list(negatives)))
            sums[0] += positive_score
            sums[1] += sum(negatives.values())
            found += len(negatives)
    if not chosen:
        raise DataError(
            f"No row got {least} negative{'s' if least > 1 else ''} out of {len(task.documents):,} documents. Skipped: "
            f"{'; '.join(f'{count:,} {reason}' for reason, count in dropped.items()) or 'none'}. Give a corpus, a "
            "larger range_max or looser limits."
        )
    return MinedNegatives(
        dataset=_dataset(task, chosen, output_format),
        rows=len(task.rows),
        documents=len(task.documents),
        too_few=len(task.rows) - len(chosen),
        dropped=dict(sorted(dropped.items())),
        positive_score=sums[0] / len(chosen),
        negative_score=sums[1] / found,
        search=search,
    )


def _dataset(task: _Task, chosen: list[tuple[int, list[int]]], output_format: str) -> Dataset:
    if output_format == "triplet":
        chosen = [(row, [negative]) for row, negatives in chosen for negative in negatives]
    table = task.pairs.with_format("arrow").select([row for row, _ in chosen])[:]
    documents = pa.array(task.documents, pa.large_string())
    columns = [documents.take(pa.array(column)) for column in zip(*(negatives for _, negatives in chosen), strict=True)]
    names = ["negative"] if len(columns) == 1 else [f"negative_{number}" for number in range(1, len(columns) + 1)]
    for name, column in zip(names, columns, strict=True):
        table = table.append_column(name, column)
    return to_dataset(table.replace_schema_metadata(None))
