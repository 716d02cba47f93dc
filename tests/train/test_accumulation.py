"""Gradient accumulation gives a loss no more negatives, and says so."""

import warnings
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses

from embtune.errors import EmbtuneWarning
from embtune.train.accumulation import warn_about_accumulation


@pytest.fixture(scope="module")
def model(minilm_dir: Path) -> SentenceTransformer:
    return SentenceTransformer(str(minilm_dir), device="cpu")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("MultipleNegativesRankingLoss", "use CachedMultipleNegativesRankingLoss"),
        ("GISTEmbedLoss", "use CachedMultipleNegativesRankingLoss"),
        ("MegaBatchMarginLoss", "use CachedMultipleNegativesRankingLoss"),
        ("ContrastiveTensionLossInBatchNegatives", "use CachedMultipleNegativesRankingLoss"),
        ("CachedMultipleNegativesRankingLoss", "Raise per_device_train_batch_size"),
        ("CachedGISTEmbedLoss", "Raise per_device_train_batch_size"),
        ("MultipleNegativesSymmetricRankingLoss", "use CachedMultipleNegativesRankingLoss"),
        ("CachedMultipleNegativesSymmetricRankingLoss", "Raise per_device_train_batch_size"),
        ("BatchAllTripletLoss", "gradient checkpointing makes room"),
        ("BatchHardTripletLoss", "gradient checkpointing makes room"),
        ("BatchHardSoftMarginTripletLoss", "gradient checkpointing makes room"),
        ("BatchSemiHardTripletLoss", "gradient checkpointing makes room"),
    ],
)
@pytest.mark.filterwarnings("ignore:The .*SymmetricRankingLoss is deprecated:DeprecationWarning")
def test_accumulation_does_not_enlarge_a_contrastive_batch(model: SentenceTransformer, name: str, remedy: str) -> None:
    guide = (model,) if "GIST" in name else ()
    loss = getattr(losses, name)(model, *guide)
    with pytest.warns(EmbtuneWarning, match=rf"gradient_accumulation_steps=4 does not enlarge.*{name}.*{remedy}"):
        warn_about_accumulation(4, loss)
    with pytest.warns(EmbtuneWarning, match=name):
        warn_about_accumulation(2, {"pairs": losses.MatryoshkaLoss(model, loss, [384, 64])})


def test_accumulation_is_fine_otherwise(model: SentenceTransformer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about_accumulation(1, losses.MultipleNegativesRankingLoss(model))
        for name in ("CoSENTLoss", "AnglELoss", "TripletLoss", "ContrastiveLoss", "OnlineContrastiveLoss", "MSELoss"):
            warn_about_accumulation(8, getattr(losses, name)(model))
        for name in ("MarginMSELoss", "DistillKLDivLoss", "ContrastiveTensionLoss"):
            warn_about_accumulation(8, getattr(losses, name)(model))
        warn_about_accumulation(8, losses.SoftmaxLoss(model, 384, 2))
        warn_about_accumulation(8, {"sts": losses.CosineSimilarityLoss(model)})
