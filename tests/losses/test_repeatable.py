"""Which losses a CUDA graph may repeat, and when it has to be another graph."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import cos_sim
from torch import Tensor, nn

from embtune import losses
from embtune.losses.repeatable import settings_of
from embtune.losses.services import SERVICES, Service

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def model(tiny_dir: Callable[..., Path]) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_dir("bert")), device="cpu")


def test_settings_differ_when_an_attribute_does(model: SentenceTransformer) -> None:
    loss = losses.MultipleNegativesRankingLoss(model)
    before = settings_of(loss)
    assert before is not None
    assert settings_of(loss) == before
    loss.scale = 5.0
    assert settings_of(loss) != before
    outer = losses.MatryoshkaLoss(model, loss, [32, 16])
    before = settings_of(outer)
    loss.scale = 20.0
    changed = settings_of(outer)
    assert None not in (before, changed)
    assert changed != before
    outer.matryoshka_weights = [0.5, 1.0]
    assert settings_of(outer) != changed


def test_what_a_graph_could_not_repeat_has_no_settings(model: SentenceTransformer) -> None:
    def own(a: Tensor, b: Tensor) -> Tensor:
        return a @ b.T * float(torch.rand(()))

    @functools.wraps(cos_sim)
    def wrapped(a: Tensor, b: Tensor) -> Tensor:
        return own(a, b)

    class Subclass(losses.MultipleNegativesRankingLoss):
        pass

    ranking = losses.MultipleNegativesRankingLoss
    hooked = ranking(model)
    hooked.register_forward_hook(lambda *_: None)
    refused = (
        Subclass(model),
        ranking(model, similarity_fct=own),
        ranking(model, similarity_fct=wrapped),
        hooked,
        ranking(model, hardness_mode="all_negatives", hardness_strength=1.0),
        ranking(model, directions=("query_to_doc", "query_to_query")),
        losses.MatryoshkaLoss(model, ranking(model), [32, 16], n_dims_per_step=1),
        losses.MatryoshkaLoss(model, ranking(model, similarity_fct=own), [32, 16]),
        losses.CosineSimilarityLoss(model, cos_score_transformation=nn.Linear(1, 1)),
        losses.CosineSimilarityLoss(model, cos_score_transformation=nn.Sequential(nn.Dropout())),
        losses.CosineSimilarityLoss(model, nn.BCEWithLogitsLoss(pos_weight=torch.ones(1))),
        losses.SoftmaxLoss(model, 32, 2),
        losses.CachedMultipleNegativesRankingLoss(model),
        losses.OnlineContrastiveLoss(model),
    )
    assert [settings_of(loss) for loss in refused] == [None] * len(refused)


def test_only_losses_that_are_handed_embeddings_are_repeated(model: SentenceTransformer) -> None:
    served = [name for name in SERVICES if hasattr(losses, name)]
    made = {}
    for name in served:
        try:
            made[name] = getattr(losses, name)(model)
        except (TypeError, ValueError, AttributeError):  # it wants more than a model
            continue
    repeated = {name for name, loss in made.items() if settings_of(loss) is not None}
    assert {"MultipleNegativesRankingLoss", "MarginMSELoss", "TripletLoss"} <= repeated
    assert {SERVICES[name] for name in repeated} == {Service.PRECOMPUTED}
