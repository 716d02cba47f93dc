"""Mined negatives, against a reference that compares everything with everything."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from embtune.data import ranking
from embtune.data.mining import mine_hard_negatives
from embtune.data.mining_rules import NEAR_DUPLICATE, TOO_CLOSE, TOO_HIGH, TOO_LOW, MiningRules
from embtune.data.near_duplicates import jaccard, word_set
from embtune.errors import ArgumentError, DataError
from embtune.losses import MultipleNegativesRankingLoss

VERBS = ("read", "sort", "count", "merge", "hash")
NOUNS = ("rows", "words", "files", "prices", "users", "trees")
PAIRS = [(f"how to {verb} {noun}", f"{verb} the {noun} of one customer") for verb in VERBS for noun in NOUNS]
PAIRS += [
    ("How  to READ rows", "a second answer: open them one by one"),
    ("how to sort rows", "SORT the rows of one customer"),
]
CORPUS = [
    "how to merge files",  # an anchor itself
    "Read the rows of one  customer",  # a positive but for case and white space
    "read all the rows of one customer",  # a positive but for a word
    "count the stars above one mountain",
    "walk the dogs of one customer",
    "nothing to do with any of it",
    "nothing to do with any of it",
]
RULES = MiningRules(num_negatives=3, range_max=20, relative_margin=None)


@pytest.fixture(scope="module")
def model(minilm_dir: Path) -> SentenceTransformer:
    return SentenceTransformer(str(minilm_dir), device="cpu")


def pairs(rows: Sequence[tuple[str, str]] = PAIRS) -> Dataset:
    return Dataset.from_list([{"anchor": anchor, "positive": positive} for anchor, positive in rows])


def key(text: str) -> str:
    return " ".join(text.casefold().split())


def brute_force(
    model: SentenceTransformer, rules: MiningRules, corpus: Sequence[str]
) -> tuple[list[tuple], Counter[str]]:
    """(anchor, positive, negatives …) of every row that gets enough, and why candidates were skipped."""
    documents = list({key(text): text for text in [*(p for _, p in PAIRS), *corpus][::-1]}.values())[::-1]
    anchors = {key(anchor): anchor for anchor, _ in PAIRS[::-1]}
    vectors = dict(zip(documents, model.encode_document(documents, convert_to_tensor=True), strict=True))
    rows, skipped = [], Counter[str]()
    for anchor, positive in PAIRS:
        own = [other for each, other in PAIRS if key(each) == key(anchor)]
        query = model.encode_query([anchors[key(anchor)]], convert_to_tensor=True)[0]
        score = {text: float(model.similarity(query, vector)) for text, vector in vectors.items()}
        target = next(score[text] for text in documents if key(text) == key(positive))
        share = rules.relative_margin
        margins = rules.absolute_margin, share and share * abs(target)
        banned = {key(anchor), *map(key, own)}
        ranked = sorted((text for text in documents if key(text) not in banned), key=lambda text: -score[text])
        negatives: list[str] = []
        for text in ranked[rules.range_min : rules.range_max]:
            if len(negatives) == rules.num_negatives:
                break
            if rules.max_score is not None and score[text] > rules.max_score:
                skipped[TOO_HIGH] += 1
            elif rules.min_score is not None and score[text] < rules.min_score:
                skipped[TOO_LOW] += 1
            elif any(margin is not None and score[text] > target - margin for margin in margins):
                skipped[TOO_CLOSE] += 1
            elif any(jaccard(word_set(text), word_set(other)) >= rules.near_duplicates for other in [anchor, *own]):
                skipped[NEAR_DUPLICATE] += 1
            else:
                negatives.append(text)
        if len(negatives) == rules.num_negatives:
            rows.append((anchor, positive, *negatives))
    return rows, skipped


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_negatives": 1},
        {"range_min": 4, "num_negatives": 5},
        {"max_score": 0.6},
        {"min_score": 0.5},
        {"absolute_margin": 0.2},
        {"relative_margin": 0.3},
        {"absolute_margin": 0.1, "relative_margin": 0.2, "min_score": 0.1, "max_score": 0.7},
        {"near_duplicates": 0.5},
    ],
    ids=str,
)
def test_equals_comparing_everything_with_everything(model: SentenceTransformer, changes: dict[str, float]) -> None:
    rules = replace(RULES, **changes)
    expected, skipped = brute_force(model, rules, CORPUS)
    mined = mine_hard_negatives(pairs(), model, rules, corpus=CORPUS)
    assert [tuple(row.values()) for row in mined.dataset] == expected
    assert mined.dropped == skipped
    assert mined.too_few == len(PAIRS) - len(expected)
    assert not changes.keys() & {"min_score", "max_score", "absolute_margin"} or mined.dropped


@pytest.mark.parametrize("chunk", [1, 7, 36])
def test_blocks_make_no_difference(model: SentenceTransformer, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mine_hard_negatives(pairs(), model, RULES, corpus=CORPUS)
    monkeypatch.setattr(ranking, "SCORES_PER_BLOCK", 5 * chunk)
    blocks = mine_hard_negatives(pairs(), model, RULES, corpus=CORPUS, chunk=chunk, batch_size=3)
    assert list(blocks.dataset) == list(whole.dataset)
    assert blocks.dropped == whole.dropped
    assert blocks.positive_score == pytest.approx(whole.positive_score, abs=1e-6)


def test_no_negative_answers_the_anchor(model: SentenceTransformer) -> None:
    mined = mine_hard_negatives(pairs(), model, RULES, corpus=CORPUS)
    assert mined.documents == len({key(text) for text in [*CORPUS, *(positive for _, positive in PAIRS)]})
    for row in mined.dataset:
        forbidden = {key(positive) for anchor, positive in PAIRS if key(anchor) == key(row["anchor"])}
        negatives = [key(text) for name, text in row.items() if name.startswith("negative")]
        assert not forbidden & set(negatives)
        assert key(row["anchor"]) not in negatives
        assert len(set(negatives)) == 3
    of_first = mined.dataset[0]
    assert "read all the rows of one customer" not in of_first.values()
    assert mined.dropped == {NEAR_DUPLICATE: 2}


def test_equal_scores_rank_by_position(tiny_dir: Callable[..., Path]) -> None:
    model = SentenceTransformer(str(tiny_dir("bert")), device="cpu")
    # An uncased tokenizer that knows none of the words reads all of these alike.
    corpus = [f"{sign} {sign}" for sign in "☀☁☂☃☄★"]
    rules = MiningRules(num_negatives=6, relative_margin=None, min_score=-1.0)
    rows = [
        mine_hard_negatives(pairs(PAIRS[:1]), model, rules, corpus=order).dataset[0] for order in (corpus, corpus[::-1])
    ]
    assert list(rows[0].values())[2:] == corpus
    assert list(rows[1].values())[2:] == corpus[::-1]


def test_triplets_keep_rows_with_fewer_negatives(model: SentenceTransformer) -> None:
    rules = replace(RULES, max_score=0.3, range_max=12)
    tuples = mine_hard_negatives(pairs(), model, rules)
    triplets = mine_hard_negatives(pairs(), model, rules, output_format="triplet")
    assert tuples.dataset.column_names == ["anchor", "positive", "negative_1", "negative_2", "negative_3"]
    assert triplets.dataset.column_names == ["anchor", "positive", "negative"]
    assert tuples.too_few > triplets.too_few
    of_tuples = [(row["anchor"], row["positive"], row[f"negative_{n}"]) for row in tuples.dataset for n in (1, 2, 3)]
    of_triplets = [tuple(row.values()) for row in triplets.dataset]
    assert set(of_tuples) < set(of_triplets)
    assert {row["anchor"] for row in tuples.dataset} < {row["anchor"] for row in triplets.dataset}


def test_what_is_mined_trains(model: SentenceTransformer) -> None:
    rows = mine_hard_negatives(pairs(), model, RULES).dataset
    features = [model.preprocess(list(rows[column])) for column in rows.column_names]
    loss = MultipleNegativesRankingLoss(model)
    assert 0 < loss(features, None).item() < float("inf")


def test_summary_says_what_was_left_out(model: SentenceTransformer) -> None:
    mined = mine_hard_negatives(pairs(), model, replace(RULES, max_score=0.3, range_max=12), corpus=CORPUS)
    text = str(mined)
    assert f"{len(mined.dataset)} rows with anchor, positive, negative_1, negative_2, negative_3, from 32 rows" in text
    assert f"{mined.dropped[TOO_HIGH]:,} candidates skipped: scored above max_score." in text
    assert f"{mined.too_few} rows left out" in text
    assert mined.positive_score > mined.negative_score


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_negatives": 0}, "num_negatives=0 must be at least 1"),
        ({"range_min": -1}, "range_min=-1"),
        ({"range_min": 8, "range_max": 10}, "range_min=8 and range_max=10 leave 2 candidates for num_negatives=3"),
        ({"range_min": 8, "range_max": 4}, "leave 0 candidates"),
        ({"min_score": 0.9, "max_score": 0.1}, "min_score=0.9 is more than max_score=0.1"),
        ({"absolute_margin": -0.1}, "absolute_margin=-0.1 must be at least 0"),
        ({"relative_margin": float("nan")}, "relative_margin=nan"),
        ({"near_duplicates": 0.0}, "near_duplicates=0.0"),
    ],
)
def test_rules_that_cannot_be(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        MiningRules(**changes)


def test_data_that_cannot_be_mined(model: SentenceTransformer) -> None:
    labelled = pairs().add_column("label", [1] * len(PAIRS))
    with pytest.raises(DataError, match="alone, not anchor, positive, label"):
        mine_hard_negatives(labelled, model)
    with pytest.raises(DataError, match="no pairs to mine"):
        mine_hard_negatives(Dataset.from_dict({"anchor": [], "positive": []}), model)
    with pytest.raises(DataError, match="No row got 3 negatives out of 2 documents"):
        mine_hard_negatives(pairs(PAIRS[:2]), model, RULES)
    with pytest.raises(ArgumentError, match="output_format='pairs'"):
        mine_hard_negatives(pairs(), model, output_format="pairs")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="chunk=0"):
        mine_hard_negatives(pairs(), model, chunk=0)
