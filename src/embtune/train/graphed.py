"""A training step whose encoder is replayed from CUDA graphs."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from embtune.accelerate.graphs import EncoderGraphs
from embtune.accelerate.recordable import embed_row, why_not_recordable
from embtune.errors import ArgumentError
from embtune.packing.row import PREPARED

if TYPE_CHECKING:
    from embtune.train.trainer import SentenceTransformerTrainer


def encoder_graphs(trainer: "SentenceTransformerTrainer") -> EncoderGraphs:
    """The graphs of a run that is about to begin.

    Raises:
        ArgumentError: this run cannot be recorded; the message says why.
    """
    model, args = trainer.model, trainer.args
    autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    engine = getattr(model, "engine", None)
    obstacle = why_not_recordable(model, engine, autocast or model.dtype, args.gradient_checkpointing)
    if obstacle is not None:
        raise ArgumentError(f"cuda_graphs=True cannot be honoured: {obstacle}.")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return EncoderGraphs(partial(embed_row, model), trained, autocast=autocast)


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
