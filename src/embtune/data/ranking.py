"""The best documents for each query, block by block: never all similarities, nor all document embeddings, at once.

Shapes: Q queries, D documents of a block, N documents kept for each query.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from rich.console import Console
from rich.progress import Progress
from sentence_transformers import SentenceTransformer

from embtune.errors import ModelError

SCORES_PER_BLOCK = 2**21  # 8 MiB of float32, which an allocator reuses; 64 MiB took 1.7 times as long

Encode: TypeAlias = Callable[..., torch.Tensor]
Blocks: TypeAlias = Callable[[Encode, Sequence[str]], Iterator[tuple[int, torch.Tensor]]]


def rank_documents(
    model: SentenceTransformer,
    queries: Sequence[str],
    documents: Sequence[str],
    *,
    keep: int,
    batch_size: int,
    chunk: int,
    show_progress: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank `documents` for each query by the model's own similarity.

    Returns scores_QN and positions_QN in `documents`, both on the CPU, best first; N is `keep` or the number of
    documents if that is less. Equal scores rank in the order of `documents`, whatever `chunk` is.
    """
    with encoding(len(queries) + len(documents), batch_size, chunk, show_progress) as blocks:
        queries_QE = torch.cat([block for _, block in blocks(model.encode_query, queries)])
        best = nothing_yet(len(queries), min(keep, len(documents)), queries_QE.device)
        rows = max(1, SCORES_PER_BLOCK // chunk)
        for first, documents_DE in blocks(model.encode_document, documents):
            for part in (slice(start, start + rows) for start in range(0, len(queries), rows)):
                scores_QD = model.similarity(queries_QE[part], documents_DE)
                best[0][part], best[1][part] = merge_best(best[0][part], best[1][part], scores_QD, first)
    return best[0].cpu(), best[1].cpu()


@contextmanager
def encoding(texts: int, batch_size: int, chunk: int, show_progress: bool) -> Iterator[Blocks]:
    """A function that encodes `chunk` texts at a time, and gives the position of each block's first and the block.

    Args:
        texts: how many there will be, for the display.
    """
    with Progress(console=Console(stderr=True), disable=not show_progress) as progress:
        task = progress.add_task("Encoding queries and documents", total=texts)

        def blocks(encode: Encode, texts: Sequence[str]) -> Iterator[tuple[int, torch.Tensor]]:
            for start in range(0, len(texts), chunk):
                block = embed(encode, texts[start : start + chunk], batch_size=batch_size)
                progress.advance(task, len(block))
                yield start, block

        yield blocks


def nothing_yet(queries: int, keep: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and positions of `keep` places that no document has taken."""
    scores_QN = torch.full((queries, keep), -torch.inf, device=device)
    return scores_QN, torch.full((queries, keep), -1, device=device)


def merge_best(
    scores_QN: torch.Tensor, positions_QN: torch.Tensor, scores_QD: torch.Tensor, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best N of those kept so far and of a block of later documents, whose first one has position `first`."""
    block_QD = torch.arange(first, first + scores_QD.shape[1], device=scores_QD.device).expand(len(scores_QD), -1)
    return merge_ranked(scores_QN, positions_QN, scores_QD, block_QD)


def merge_ranked(
    scores_QN: torch.Tensor, positions_QN: torch.Tensor, scores_QD: torch.Tensor, positions_QD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best N of those kept so far and of others, whose positions are later and rise along each row."""
    scores_QM = torch.cat([scores_QN, scores_QD], dim=1)
    positions_QM = torch.cat([positions_QN, positions_QD], dim=1)
    chosen_QN = _stable_top(scores_QM, scores_QN.shape[1])
    return scores_QM.gather(1, chosen_QN), positions_QM.gather(1, chosen_QN)


def _stable_top(scores_QM: torch.Tensor, keep: int) -> torch.Tensor:
    """Columns of the `keep` highest scores, best first, equal scores by column.

    `topk` chooses freely among equal scores, which would let the block size decide a metric; a stable sort of every
    row costs several times more, so only rows that tie at the last place kept are sorted whole.
    """
    top = scores_QM.topk(keep, dim=1)
    columns_QN = top.indices
    tied_Q = (scores_QM >= top.values[:, -1:]).sum(dim=1) > keep
    if tied_Q.any():
        columns_QN[tied_Q] = scores_QM[tied_Q].sort(dim=1, descending=True, stable=True).indices[:, :keep]
    columns_QN = columns_QN.sort(dim=1).values
    order_QN = scores_QM.gather(1, columns_QN).sort(dim=1, descending=True, stable=True).indices
    return columns_QN.gather(1, order_QN)


def embed(
    encode: Callable[..., torch.Tensor], texts: Sequence[str], *, batch_size: int, show_progress: bool = False
) -> torch.Tensor:
    """Embeddings as float32 (texts, dimensions) on the model's device, by `model.encode` or one of its relatives.

    Scores are computed in float32 because in a half-precision dtype many similarities round to the same number, and
    ties would then decide the ranking.

    Raises:
        ModelError: the model returned NaN or infinity.
    """
    embeddings_BD = encode(
        list(texts), batch_size=batch_size, convert_to_tensor=True, show_progress_bar=show_progress
    ).float()
    finite_B = embeddings_BD.isfinite().all(dim=1)
    if not finite_B.all():
        text = texts[int(finite_B.int().argmin())]
        raise ModelError(
            f"The model returned NaN or infinity for {int((~finite_B).sum())} of {len(texts)} texts, first for "
            f"{text[:80]!r}. Its weights may be damaged, or float16 overflows: load it with dtype=float32."
        )
    return embeddings_BD
