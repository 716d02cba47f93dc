"""The documents that score highest for each anchor, block by block, by PyTorch or by faiss, with the same result.

A product of matrices rounds by its shape and by its library. So a search only names the documents that come close,
within the error of a product; what ranks them is the similarity of each pair by itself.

Shapes: A anchors, R of them that are looked at together, D documents of a block, E dimensions, N documents kept for
each anchor, P pairs of anchor and document.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from sentence_transformers import SentenceTransformer, SimilarityFunction
from sentence_transformers.util import dot_score, normalize_embeddings, pairwise_dot_score

from embtune.data import ranking
from embtune.errors import ArgumentError
from embtune.runtime import require

Search: TypeAlias = Literal["auto", "torch", "faiss"]
SEARCHES = ("auto", "torch", "faiss")

_PAIRS_AT_ONCE = 2**10  # what fits into a processor's cache; 2**14 takes 15 times as long
# What a product may be wrong by where PyTorch was told to cut its two factors to 10 or 7 bits behind the first.
_CUT_FACTORS = {"tf32": 2**-9, "bf16": 2**-6}
_FAISS_SPARE = 16  # candidates beyond N, for documents that are excluded or close to the N-th


class Candidates(NamedTuple):
    """What `rank_candidates` returns, on the CPU."""

    scores_AN: torch.Tensor
    """Best first; -inf where an anchor has fewer than N documents that are not excluded."""
    positions_AN: torch.Tensor
    """Of the documents; -1 beside -inf."""
    excluded_P: torch.Tensor
    """The similarity of each excluded pair."""

    def of(self, anchor: int, first: int) -> Iterator[tuple[int, float]]:
        """Document and score, from rank `first` on."""
        positions, scores = self.positions_AN[anchor, first:].tolist(), self.scores_AN[anchor, first:].tolist()
        return ((position, score) for position, score in zip(positions, scores, strict=True) if position >= 0)


def choose_search(search: Search, model: SentenceTransformer) -> Literal["torch", "faiss"]:
    """Resolve "auto", which is PyTorch: it was measured to be the faster one (docs/decisions.md).

    Raises:
        ArgumentError: `search` is unknown, or faiss has no product for the model's similarity.
        MissingPackageError: faiss is asked for and not installed.
    """
    if search not in SEARCHES:
        raise ArgumentError(f"search={search!r} is not known; use one of {', '.join(SEARCHES)}.")
    if search == "auto":
        return "torch"
    if search == "faiss":
        require("faiss", "search='faiss'")
        if model.similarity_fn_name not in (SimilarityFunction.COSINE.value, SimilarityFunction.DOT_PRODUCT.value):
            raise ArgumentError(
                f"search='faiss' is for cosine and dot products, and this model compares by "
                f"{model.similarity_fn_name}; use search='torch'."
            )
    return search


def rank_candidates(
    model: SentenceTransformer,
    anchors: Sequence[str],
    documents: Sequence[str],
    excluded: Sequence[tuple[int, int]],
    *,
    keep: int,
    batch_size: int,
    chunk: int,
    search: Literal["torch", "faiss"],
    show_progress: bool,
) -> Candidates:
    """Rank `documents` for each anchor by the model's own similarity, but for the pairs in `excluded`.

    Exact for cosine and dot product, whatever `search` and `chunk` are, and as exact as the model's own function for
    other similarities; equal scores rank in the order of `documents`.

    Args:
        excluded: anchor and document, sorted by document.
        keep: N, unless there are fewer documents.
    """
    with ranking.encoding(len(anchors) + len(documents), batch_size, chunk, show_progress) as blocks:
        anchors_AE = torch.cat([block for _, block in blocks(model.encode_query, anchors)])
        if search == "faiss":
            anchors_AE = anchors_AE.cpu()
        best = _Best(model, anchors_AE, excluded, min(keep, len(documents)))
        for first, documents_DE in blocks(model.encode_document, documents):
            best.add(documents_DE.to(anchors_AE.device), first, search)
    return Candidates(best.scores_AN.cpu(), best.positions_AN.cpu(), best.excluded_P.cpu())


class _Best:
    """The best documents of each anchor so far."""

    def __init__(
        self, model: SentenceTransformer, anchors_AE: torch.Tensor, excluded: Sequence[tuple[int, int]], keep: int
    ) -> None:
        self._similarity = _Similarity(model)
        self._anchors_AE = self._similarity.prepared(anchors_AE)
        self._anchor_P, self._document_P = torch.tensor(excluded).T.contiguous().to(anchors_AE.device)
        self.scores_AN, self.positions_AN = ranking.nothing_yet(len(anchors_AE), keep, anchors_AE.device)
        self.excluded_P = torch.empty(len(excluded), device=anchors_AE.device)

    def add(self, documents_DE: torch.Tensor, first: int, search: Literal["torch", "faiss"]) -> None:
        """Rank a block of documents, the first of which has position `first`, among those so far."""
        bounds = torch.tensor([first, first + len(documents_DE)], device=documents_DE.device)
        here = slice(*torch.searchsorted(self._document_P, bounds).tolist())
        block = _Block(self._similarity, documents_DE, self._anchor_P[here], self._document_P[here] - first)
        self.excluded_P[here] = block.similarity(self._anchors_AE, block.anchor_P, block.document_P)
        if search == "faiss":
            rest = self._add_by_faiss(block, first)
        else:
            rest = torch.arange(len(self._anchors_AE), device=documents_DE.device)
        rows = max(1, ranking.SCORES_PER_BLOCK // len(documents_DE))
        for start in range(0, len(rest), rows):
            anchor_R = rest[start : start + rows]
            scores_RD = block.scores(self._anchors_AE[anchor_R], anchor_R)
            row_P, document_P = self._close(block, anchor_R, scores_RD)
            self._merge(block, first, anchor_R, row_P, document_P)

    def _close(self, block: "_Block", anchor_R: torch.Tensor, scores_RD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Row and document of every pair that may be among its anchor's best."""
        keep = self.scores_AN.shape[1]
        error_R = block.error(self._anchors_AE[anchor_R])
        bound_R = self._bound(anchor_R, error_R)
        close_RD = scores_RD >= bound_R[:, None]
        if scores_RD.shape[1] > keep and close_RD.sum() > 4 * keep * len(anchor_R):
            last_R = scores_RD.topk(keep, dim=1).values[:, -1]
            close_RD = scores_RD >= torch.maximum(bound_R, last_R - 2 * error_R)[:, None]
        return close_RD.nonzero(as_tuple=True)

    def _bound(self, anchor_R: torch.Tensor, error_R: torch.Tensor) -> torch.Tensor:
        """What a product's score must reach; never -inf, which is the score of an excluded pair."""
        return (self.scores_AN[anchor_R, -1] - error_R).clamp(min=torch.finfo(torch.float32).min)

    def _add_by_faiss(self, block: "_Block", first: int) -> torch.Tensor:
        """Merge what faiss finds, and return the anchors for which it may have missed a document."""
        keep = self.scores_AN.shape[1]
        scores_AK, documents_AK = block.nearest(self._anchors_AE, keep + _FAISS_SPARE)
        least_A = scores_AK[:, -1].clone()
        block.exclude_found(scores_AK, documents_AK)
        every_A = torch.arange(len(scores_AK))
        error_A = block.error(self._anchors_AE)
        bound_A = self._bound(every_A, error_A)
        if scores_AK.shape[1] >= keep:
            last_A = scores_AK.topk(keep, dim=1).values[:, -1]
            bound_A = torch.maximum(bound_A, last_A - 2 * error_A)
        missed_A = (least_A >= bound_A) & (scores_AK.shape[1] < block.size)
        close_AK = (scores_AK >= bound_A[:, None]) & ~missed_A[:, None]
        documents_AK, order_AK = documents_AK.sort(dim=1)
        row_P, column_P = close_AK.gather(1, order_AK).nonzero(as_tuple=True)
        self._merge(block, first, every_A, row_P, documents_AK[row_P, column_P])
        return missed_A.nonzero().flatten()

    def _merge(
        self, block: "_Block", first: int, anchor_R: torch.Tensor, row_P: torch.Tensor, document_P: torch.Tensor
    ) -> None:
        """Rank pairs, sorted by row and document, among what their anchors have so far."""
        count_R = row_P.bincount(minlength=len(anchor_R))
        column_P = torch.arange(len(row_P), device=row_P.device) - (count_R.cumsum(0) - count_R)[row_P]
        scores_RM, positions_RM = ranking.nothing_yet(len(anchor_R), int(count_R.max()), row_P.device)
        scores_RM[row_P, column_P] = block.similarity(self._anchors_AE, anchor_R[row_P], document_P)
        positions_RM[row_P, column_P] = document_P + first
        self.scores_AN[anchor_R], self.positions_AN[anchor_R] = ranking.merge_ranked(
            self.scores_AN[anchor_R], self.positions_AN[anchor_R], scores_RM, positions_RM
        )


class _Similarity:
    """The model's own; a cosine is a dot product of vectors that were made one long beforehand."""

    def __init__(self, model: SentenceTransformer) -> None:
        self._cosine = model.similarity_fn_name == SimilarityFunction.COSINE.value
        self.of_all = dot_score if self._cosine else model.similarity
        self.of_pairs = pairwise_dot_score if self._cosine else model.similarity_pairwise

    def prepared(self, embeddings_BE: torch.Tensor) -> torch.Tensor:
        """What the two functions take."""
        return normalize_embeddings(embeddings_BE) if self._cosine else embeddings_BE


class _Block:
    """Some documents, and which of them are excluded for which anchor."""

    def __init__(
        self, similarity: "_Similarity", documents_DE: torch.Tensor, anchor_P: torch.Tensor, document_P: torch.Tensor
    ) -> None:
        self.anchor_P = anchor_P
        self.document_P = document_P
        self.size = len(documents_DE)
        self._similarity = similarity
        self._documents_DE = similarity.prepared(documents_DE)
        self._longest = self._documents_DE.norm(dim=1).max()

    def error(self, anchors_RE: torch.Tensor) -> torch.Tensor:
        """By how much a product of matrices in float32 may be wrong for each anchor: about E units of rounding, times
        the lengths of both vectors (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1)."""
        units = (anchors_RE.shape[1] + 8) * torch.finfo(torch.float32).eps / 2
        backend = torch.backends.cuda if anchors_RE.is_cuda else torch.backends.mkldnn
        units += _CUT_FACTORS.get(backend.matmul.fp32_precision, 0)
        return units * self._longest * anchors_RE.norm(dim=1)

    def similarity(self, anchors_AE: torch.Tensor, anchor_P: torch.Tensor, document_P: torch.Tensor) -> torch.Tensor:
        """Of each pair by itself, in float64 where the device has it: what it is depends on no other pair."""
        wide = torch.float32 if anchors_AE.device.type == "mps" else torch.float64
        parts = zip(anchor_P.split(_PAIRS_AT_ONCE), document_P.split(_PAIRS_AT_ONCE), strict=True)
        return torch.cat(
            [
                self._similarity.of_pairs(anchors_AE[anchors].to(wide), self._documents_DE[documents].to(wide)).float()
                for anchors, documents in parts
            ]
        )

    def scores(self, anchors_RE: torch.Tensor, anchor_R: torch.Tensor) -> torch.Tensor:
        """Of these anchors and all documents, excluded pairs at -inf; `anchor_R` is sorted."""
        scores_RD = self._similarity.of_all(anchors_RE, self._documents_DE)
        row_P = torch.searchsorted(anchor_R, self.anchor_P).clamp(max=len(anchor_R) - 1)
        there_P = anchor_R[row_P] == self.anchor_P
        scores_RD[row_P[there_P], self.document_P[there_P]] = -torch.inf
        return scores_RD

    def nearest(self, anchors_AE: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and documents by faiss, best first; excluded ones are among them."""
        import faiss

        scores, found = faiss.knn(
            anchors_AE.numpy(), self._documents_DE.numpy(), min(count, self.size), metric=faiss.METRIC_INNER_PRODUCT
        )
        return torch.from_numpy(scores), torch.from_numpy(found)

    def exclude_found(self, scores_AK: torch.Tensor, documents_AK: torch.Tensor) -> None:
        """Set the scores of excluded pairs to -inf."""
        hit_P, hit_K = (documents_AK[self.anchor_P] == self.document_P[:, None]).nonzero(as_tuple=True)
        scores_AK[self.anchor_P[hit_P], hit_K] = -torch.inf
