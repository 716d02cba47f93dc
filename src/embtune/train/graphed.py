"""A training step whose encoder is replayed from CUDA graphs."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from datasets import IterableDataset
from torch.utils.data import ConcatDataset, Dataset

from embtune.accelerate.graphs import EncoderGraphs
from embtune.accelerate.loss_graphs import LossGraphs
from embtune.accelerate.recordable import embed_row, why_not_recordable
from embtune.accelerate.row_sizes import choose_row_sizes
from embtune.errors import ArgumentError
from embtune.losses.services import takes_one_pass
from embtune.packing.row import PREPARED
from embtune.train.collator import TokenRows

if TYPE_CHECKING:
    from embtune.train.trainer import SentenceTransformerTrainer

# A graph's own memory is small: activations lie in one pool that all of them write over.
SHAPES = 16


def encoder_graphs(trainer: "SentenceTransformerTrainer") -> EncoderGraphs | None:
    """The graphs of a run that is about to begin; None, and printed why, where it goes without.

    Raises:
        ArgumentError: graphs were asked for, and this run cannot be recorded; the message says why.
    """
    model, args = trainer.model, trainer.args
    mode = getattr(args, "cuda_graphs", "auto")
    if mode == "never" or (mode == "auto" and model.device.type != "cuda"):
        return None
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)
    engine = getattr(model, "engine", None)
    obstacle = _why_not_laid_out(trainer) or why_not_recordable(
        model, engine, autocast or model.dtype, args.gradient_checkpointing
    )
    if obstacle is not None or engine is None:
        if mode == "always":
            raise ArgumentError(f'cuda_graphs="always" cannot be honoured: {obstacle}.')
        print(f"CUDA graphs: off, because {obstacle}", flush=True)
        return None
    print(f"CUDA graphs: on, for up to {SHAPES} sizes of a batch; each is recorded when it first comes", flush=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embed = partial(embed_row, model, engine, rounds_at_once=autocast is not None)
    return EncoderGraphs(embed, trained, autocast=autocast, limit=SHAPES, strict=mode == "always")


def _why_not_laid_out(trainer: "SentenceTransformerTrainer") -> str | None:
    """What keeps every batch from being laid out as a row in front of the step, or None."""
    if not any(map(takes_one_pass, trainer.losses)):
        return "the loss calls the model itself"
    if not getattr(trainer.args, "token_cache", True):
        return "token_cache=False leaves the texts to be tokenised in each step"
    if isinstance(trainer.train_dataset, IterableDataset):
        return "texts of a stream are tokenised in each step"
    return None


def loss_graphs(graphs: EncoderGraphs) -> LossGraphs:
    """What records the losses of embeddings that `graphs` replays."""
    return LossGraphs(graphs.stream, strict=graphs.strict)


def settle_row_sizes(graphs: EncoderGraphs, rows: Dataset[Any], batch: int, steps: int) -> None:
    """Choose how far flat rows are filled up, where the lengths of the texts are known before the run; print it."""
    parts = rows.datasets if isinstance(rows, ConcatDataset) else [rows]
    known = [part.lengths for part in parts if isinstance(part, TokenRows)]
    if known:
        sizes = choose_row_sizes(known, batch, steps)
        graphs.step = sizes.step
        print(f"CUDA graphs: rows are {sizes.describe()}", flush=True)


class GraphedModel:
    """Embeds rows by replaying graphs; whatever they do not serve goes to the model itself."""

    def __init__(self, model: Callable[[dict[str, Any]], dict[str, Any]], graphs: EncoderGraphs) -> None:
        self._model = model
        self._graphs = graphs

    def __call__(self, features: dict[str, Any]) -> dict[str, Any]:
        """Features in, `sentence_embedding` [N, D] out."""
        row = features.get(PREPARED)
        embeddings = None if row is None else self._graphs(row)
        return self._model(features) if embeddings is None else {"sentence_embedding": embeddings}
