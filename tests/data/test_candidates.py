"""Candidates by PyTorch and by faiss, against every similarity in float64, sorted."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import pairwise_dot_score

from embtune.data import candidates, ranking
from embtune.data.candidates import Candidates, choose_search, rank_candidates
from embtune.data.mining import mine_hard_negatives
from embtune.data.mining_rules import MiningRules
from embtune.errors import ArgumentError, MissingPackageError

ANCHORS, DOCUMENTS, KEEP = 23, 150, 9


class Vectors:
    """Stands in for a model whose texts are the numbers of vectors."""

    def __init__(self, like: SentenceTransformer, anchors: torch.Tensor, documents: torch.Tensor) -> None:
        self._anchors, self._documents = anchors, documents
        self.similarity, self.similarity_pairwise = like.similarity, like.similarity_pairwise
        self.similarity_fn_name = like.similarity_fn_name

    def encode_query(self, texts: Sequence[int], **_: object) -> torch.Tensor:
        return self._anchors[list(texts)]

    def encode_document(self, texts: Sequence[int], **_: object) -> torch.Tensor:
        return self._documents[list(texts)]


def vectors(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    anchors, documents = torch.randn(ANCHORS, 24), torch.randn(DOCUMENTS, 24)
    if kind == "repeated":  # in every block there are more equal scores than places
        documents = documents[torch.randint(3, (DOCUMENTS,))]
    if kind == "alike":  # closer to each other than a product of matrices can tell
        documents = documents[:1] + 1e-7 * torch.randn(DOCUMENTS, 24)
    if kind == "rising":
        documents = documents[(documents @ anchors.mean(dim=0)).argsort()]
    return anchors, documents


def found(
    model: SentenceTransformer, kind: str, search: str, chunk: int, excluded: list[tuple[int, int]]
) -> Candidates:
    stand_in = Vectors(model, *vectors(kind))
    texts = range(ANCHORS), range(DOCUMENTS)
    options = {"keep": KEEP, "batch_size": 8, "chunk": chunk, "search": search, "show_progress": False}
    return rank_candidates(stand_in, *texts, excluded, **options)  # type: ignore[arg-type]


@pytest.fixture(params=["cosine", "dot", "euclidean"])
def model(request: pytest.FixtureRequest, minilm_dir: Path) -> SentenceTransformer:
    return SentenceTransformer(str(minilm_dir), device="cpu", similarity_fn_name=request.param)


# Anchor 0 excludes more documents than faiss is asked for beyond those that are kept.
EXCLUDED = sorted(
    [(0, document) for document in range(0, 120, 2)] + [(anchor, anchor * 3) for anchor in range(1, ANCHORS)],
    key=lambda pair: pair[1],
)


@pytest.mark.parametrize("kind", ["random", "repeated", "alike", "rising"])
def test_every_search_gives_one_stable_sort_of_all_pairs(
    kind: str, model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    anchors, documents = vectors(kind)
    pairwise = model.similarity_pairwise
    if model.similarity_fn_name == "cosine":
        anchors, documents = map(torch.nn.functional.normalize, (anchors, documents))
        pairwise = pairwise_dot_score
    rows = [pairwise(row.double().expand(DOCUMENTS, -1), documents.double()) for row in anchors]
    scores = torch.stack(rows).float()
    known = torch.stack([scores[pair] for pair in EXCLUDED])
    scores[tuple(torch.tensor(EXCLUDED).T)] = -torch.inf
    expected = scores.sort(dim=1, descending=True, stable=True)
    searches = ["torch"]
    if model.similarity_fn_name != "euclidean":
        pytest.importorskip("faiss")
        searches.append("faiss")
    monkeypatch.setattr(ranking, "SCORES_PER_BLOCK", 300)
    monkeypatch.setattr(candidates, "_PAIRS_AT_ONCE", 17)
    for search in searches:
        for chunk in (1, 7, 40, 200):
            best = found(model, kind, search, chunk, EXCLUDED)
            assert torch.equal(best.scores_AN, expected.values[:, :KEEP]), (search, chunk)
            assert torch.equal(best.positions_AN, expected.indices[:, :KEEP]), (search, chunk)
            assert torch.equal(best.excluded_P, known), (search, chunk)


def test_products_of_rounded_factors_name_every_document_that_comes_close(minilm_dir: Path) -> None:
    model = SentenceTransformer(str(minilm_dir), device="cpu", similarity_fn_name="dot")
    exact = found(model, "alike", "torch", 40, EXCLUDED)
    rounded = model.similarity
    model.__dict__["similarity"] = lambda left, right: rounded(left.bfloat16().float(), right.bfloat16().float())
    torch.set_float32_matmul_precision("medium")
    try:
        best = found(model, "alike", "torch", 40, EXCLUDED)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(best.positions_AN, exact.positions_AN)
    assert torch.equal(best.scores_AN, exact.scores_AN)


def test_places_without_a_document_stay_empty(minilm_dir: Path) -> None:
    pytest.importorskip("faiss")
    model = SentenceTransformer(str(minilm_dir), device="cpu")
    excluded = [(0, document) for document in range(DOCUMENTS - 4)]
    for search in ("torch", "faiss"):
        best = found(model, "random", search, 40, excluded)
        assert (best.positions_AN[0, 4:] == -1).all()
        assert sorted(position for position, _ in best.of(0, 1)) == sorted(best.positions_AN[0, 1:4].tolist())


def test_mined_rows_are_the_same_with_and_without_faiss(minilm_dir: Path) -> None:
    pytest.importorskip("faiss")
    model = SentenceTransformer(str(minilm_dir), device="cpu")
    pairs = Dataset.from_dict(
        {
            "anchor": [f"how to {verb} {noun}" for verb in ("read", "sort", "count") for noun in ("rows", "files")],
            "positive": [f"{verb} the {noun}" for verb in ("read", "sort", "count") for noun in ("rows", "files")],
        }
    )
    corpus = [f"{verb} all {noun}" for verb in ("merge", "hash", "walk") for noun in ("words", "trees", "dogs")]
    rules = MiningRules(num_negatives=3, relative_margin=None)
    by_torch, by_faiss, by_itself = (
        mine_hard_negatives(pairs, model, rules, corpus=corpus, chunk=4, search=search)
        for search in ("torch", "faiss", "auto")
    )
    assert list(by_torch.dataset) == list(by_faiss.dataset) == list(by_itself.dataset)
    assert (by_torch.positive_score, by_torch.negative_score) == (by_faiss.positive_score, by_faiss.negative_score)
    assert by_torch.dropped == by_faiss.dropped
    assert "Exact search by PyTorch." in str(by_torch)
    assert "Exact search by faiss" in str(by_faiss)


def test_which_search_is_chosen(model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    assert choose_search("auto", model) == choose_search("torch", model) == "torch"
    with pytest.raises(ArgumentError, match="search='annoy' is not known; use one of auto, torch, faiss"):
        choose_search("annoy", model)  # type: ignore[arg-type]
    if model.similarity_fn_name == "euclidean":
        with pytest.raises(ArgumentError, match="this model compares by euclidean; use search='torch'"):
            choose_search("faiss", model)
    else:
        assert choose_search("faiss", model) == "faiss"
    monkeypatch.setattr("embtune.runtime.is_installed", lambda module: False)
    with pytest.raises(MissingPackageError, match=r"pip install \"embtune\[faiss\]\""):
        choose_search("faiss", model)
