"""Which losses take embeddings that were computed before them, all columns in one pass.

A loss is listed when its forward asks the model for the embedding of each column, once, and for nothing else. Every
other loss, a user's own included, calls the model itself: column by column, still packed. That covers the cached ones,
which slice and re-run; those with a second model (a guide, a copy), which must never see one model's features; and
those that look inside the model (AdaptiveLayer, DenoisingAutoEncoder).
"""

from sentence_transformers.sentence_transformer import losses
from torch import nn

ONE_PASS: frozenset[type[nn.Module]] = frozenset(
    {
        losses.AnglELoss,
        losses.CoSENTLoss,
        losses.ContrastiveLoss,
        losses.CosineSimilarityLoss,
        losses.DistillKLDivLoss,
        losses.MarginMSELoss,
        losses.MultipleNegativesRankingLoss,
        losses.MultipleNegativesSymmetricRankingLoss,
        losses.OnlineContrastiveLoss,
        losses.SoftmaxLoss,
        losses.TripletLoss,
    }
)


def takes_one_pass(loss: nn.Module) -> bool:
    """Whether `loss` can be handed embeddings; a subclass may do anything, so only the listed classes themselves."""
    if type(loss) is losses.MatryoshkaLoss:
        return takes_one_pass(loss.loss)
    return type(loss) in ONE_PASS
