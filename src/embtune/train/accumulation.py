"""What gradient accumulation does not do: give a loss more negatives."""

import warnings
from collections.abc import Mapping

from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    BatchAllTripletLoss,
    BatchHardTripletLoss,
    BatchSemiHardTripletLoss,
    CachedGISTEmbedLoss,
    CachedMultipleNegativesRankingLoss,
    ContrastiveTensionLossInBatchNegatives,
    GISTEmbedLoss,
    MatryoshkaLoss,
    MegaBatchMarginLoss,
    MultipleNegativesRankingLoss,
)
from torch import nn

from embtune.errors import EmbtuneWarning

CACHED = (CachedMultipleNegativesRankingLoss, CachedGISTEmbedLoss)
PAIRS_IN_BATCH = (
    MultipleNegativesRankingLoss,
    GISTEmbedLoss,
    MegaBatchMarginLoss,
    ContrastiveTensionLossInBatchNegatives,
)
# They make triplets of a batch's classes; BatchHardSoftMarginTripletLoss is a BatchHardTripletLoss.
CLASSES_IN_BATCH = (BatchAllTripletLoss, BatchHardTripletLoss, BatchSemiHardTripletLoss)


def warn_about_accumulation(gradient_accumulation_steps: int, loss: nn.Module | Mapping[str, nn.Module]) -> None:
    """Warn that gradient accumulation gives a loss with in-batch negatives no more negatives."""
    if gradient_accumulation_steps <= 1:
        return
    for each in loss.values() if isinstance(loss, Mapping) else [loss]:
        innermost = innermost_loss(each)
        remedy = _remedy(innermost)
        if remedy is None:
            continue
        warnings.warn(
            f"gradient_accumulation_steps={gradient_accumulation_steps} does not enlarge the batch from which "
            f"{type(innermost).__name__} takes its negatives: each part is contrasted within itself only. {remedy}",
            EmbtuneWarning,
            stacklevel=2,
        )


def _remedy(loss: nn.Module) -> str | None:
    """How to get a larger batch, for losses that take negatives from it; None for all others."""
    if isinstance(loss, CACHED):
        return "Raise per_device_train_batch_size instead: mini_batch_size already bounds the memory."
    if isinstance(loss, PAIRS_IN_BATCH):
        return (
            "For a larger batch in the same memory use CachedMultipleNegativesRankingLoss with a large "
            "per_device_train_batch_size and a small mini_batch_size."
        )
    if isinstance(loss, CLASSES_IN_BATCH):
        return "Raise per_device_train_batch_size instead; gradient checkpointing makes room for it."
    return None


def innermost_loss(loss: nn.Module) -> nn.Module:
    """The loss that a Matryoshka or AdaptiveLayer loss holds, or the loss itself."""
    while isinstance(loss, MatryoshkaLoss | AdaptiveLayerLoss):
        loss = loss.loss
    return loss
