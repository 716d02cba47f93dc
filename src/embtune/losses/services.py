"""How each loss of sentence-transformers is served on the packed engine; the table has them all.

A loss may be handed embeddings only if its forward asks the model for the embedding of each column, once, and for
nothing else. Every other loss, a user's own included, calls the model itself. That covers those with a second model (a
guide, a copy), which must never see one model's features, and those that look inside (AdaptiveLayer,
DenoisingAutoEncoder). Only a loss that listens to the model's modules cannot be served: they compute one flat row.
"""

import warnings
from collections.abc import Iterable, Iterator
from enum import Enum

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from torch import nn

from embtune.errors import EmbtuneWarning
from embtune.models.engine import switch_to_reference
from embtune.models.heads import foreign_pre_hooks


class Service(Enum):
    """Who calls the model, and with what."""

    PRECOMPUTED = "one pass over all columns; the loss is handed their embeddings"
    CHUNKED = "the loss cuts its columns into chunks and calls the model for each, twice; every chunk is packed"
    CALLS = "the loss calls the model itself, and each call is packed"


SERVICES: dict[str, Service] = {
    **dict.fromkeys(
        (
            "AnglELoss",
            "CoSENTLoss",
            "ContrastiveLoss",
            "CosineSimilarityLoss",
            "DistillKLDivLoss",
            "EmbedDistillLoss",
            "GlobalOrthogonalRegularizationLoss",
            "MSELoss",
            "MarginMSELoss",
            "MatryoshkaLoss",  # if the loss inside is
            "MultipleNegativesRankingLoss",
            "MultipleNegativesSymmetricRankingLoss",
            "OnlineContrastiveLoss",
            "SoftmaxLoss",
            "TripletLoss",
        ),
        Service.PRECOMPUTED,
    ),
    **dict.fromkeys(
        (
            "CachedGISTEmbedLoss",
            "CachedMultipleNegativesRankingLoss",
            "CachedMultipleNegativesSymmetricRankingLoss",
            "MegaBatchMarginLoss",
        ),
        Service.CHUNKED,
    ),
    **dict.fromkeys(
        (
            "AdaptiveLayerLoss",
            "BatchAllTripletLoss",
            "BatchHardSoftMarginTripletLoss",
            "BatchHardTripletLoss",
            "BatchSemiHardTripletLoss",
            "ContrastiveTensionLoss",
            "ContrastiveTensionLossInBatchNegatives",
            "DenoisingAutoEncoderLoss",
            "GISTEmbedLoss",
            "Matryoshka2dLoss",
        ),
        Service.CALLS,
    ),
}
"""The classes that `sentence_transformers` exports, by name: a release may lack some of them."""


def is_known(loss: nn.Module) -> bool:
    """Whether the table speaks of this very class; a subclass may do anything in its forward."""
    name = type(loss).__name__
    return name in SERVICES and getattr(losses, name, None) is type(loss)


def service_of(loss: nn.Module) -> Service:
    """How `loss` is served on packed rows."""
    if not is_known(loss):
        return Service.CALLS
    if type(loss) is losses.MatryoshkaLoss:
        return service_of(loss.loss)
    return SERVICES[type(loss).__name__]


def takes_one_pass(loss: nn.Module) -> bool:
    """Whether `loss` can be handed embeddings that were computed before it."""
    return service_of(loss) is Service.PRECOMPUTED


def fall_back_for(losses_of_run: Iterable[nn.Module], model: SentenceTransformer) -> None:
    """Take `model` to the reference engine, with a warning, if packed rows cannot serve one of the losses.

    That is a loss outside the table, while somebody has hooks in the model's modules: they would be shown one flat row
    [1, tokens, …] where the loss expects its batch.
    """
    unknown = [type(part).__name__ for loss in losses_of_run for part in _nested(loss) if not is_known(part)]
    if not unknown or not _is_listened_to(model):
        return
    reason = f"{', '.join(unknown)} may listen to the model's modules, in which there are hooks"
    warnings.warn(
        f"{reason}: a packed row would show them all texts as one, so padded batches are used. "
        'Load the model with engine="reference" to ask for that yourself, or remove the hooks.',
        EmbtuneWarning,
        stacklevel=2,
    )
    model.engine = switch_to_reference(model, reason)


def _nested(loss: nn.Module | None) -> Iterator[nn.Module]:
    while isinstance(loss, nn.Module):
        yield loss
        loss = getattr(loss, "loss", None)  # the Matryoshka and AdaptiveLayer losses hold another there


def _is_listened_to(model: SentenceTransformer) -> bool:
    return any(module._forward_hooks or foreign_pre_hooks(module) for part in model for module in part.modules())
