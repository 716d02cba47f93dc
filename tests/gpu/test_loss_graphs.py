"""Losses replayed from CUDA graphs against losses that are called."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from embtune import FastSentenceTransformer, losses
from embtune.accelerate.loss_graphs import LossGraphs
from embtune.accelerate.recording import record
from embtune.losses.repeatable import settings_of
from embtune.packing.columns import embed_row_once
from embtune.packing.row import PackedRow

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")]

ROWS = 10
LOSSES: dict[str, tuple[Callable[[Any], Any], int, int]] = {
    "CosineSimilarityLoss": (losses.CosineSimilarityLoss, 2, 1),
    "MarginMSELoss": (losses.MarginMSELoss, 3, 1),
    "MarginMSELoss, two negatives": (losses.MarginMSELoss, 4, 2),
    "MatryoshkaLoss": (
        lambda model: losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [32, 16, 8]),
        3,
        0,
    ),
    "MultipleNegativesRankingLoss": (losses.MultipleNegativesRankingLoss, 2, 0),
    "MultipleNegativesRankingLoss, two negatives": (losses.MultipleNegativesRankingLoss, 4, 0),
    "MultipleNegativesSymmetricRankingLoss": (losses.MultipleNegativesSymmetricRankingLoss, 2, 0),
    "TripletLoss": (losses.TripletLoss, 3, 0),
}
"""How to make it, how many columns it takes, and how many scores for each row."""


@pytest.fixture
def model(tiny_dir: Callable[..., Path]) -> FastSentenceTransformer:
    return FastSentenceTransformer.from_pretrained(tiny_dir("bert"), device="cuda", dtype="float32")


def batch(columns: int, scores: int, seed: int, rows: int = ROWS) -> tuple[list[Tensor], Tensor | None]:
    generator = torch.Generator("cuda").manual_seed(seed)
    embeddings = [torch.randn(rows, 32, device="cuda", generator=generator).requires_grad_() for _ in range(columns)]
    shape = (rows,) if scores == 1 else (rows, scores)
    return embeddings, torch.rand(shape, device="cuda", generator=generator) if scores else None


def as_features(embeddings: list[Tensor]) -> list[dict[str, Any]]:
    """As the trainer hands them to a loss."""
    row = PackedRow.of([[[1, 2]] * len(part) for part in embeddings])
    return embed_row_once(lambda _: {"sentence_embedding": torch.cat(embeddings)}, row)


def gradients(loss: Tensor, embeddings: list[Tensor]) -> Tensor:
    return torch.cat(torch.autograd.grad(loss * 3, embeddings))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_replay_gives_what_a_call_gives(name: str, autocast: bool, model: FastSentenceTransformer) -> None:
    make, columns, scores = LOSSES[name]
    loss, graphs = make(model), LossGraphs(torch.cuda.Stream())
    settings = settings_of(loss)
    assert settings is not None
    for seed in range(3):
        embeddings, labels = batch(columns, scores, seed)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            replayed = graphs(loss, settings, as_features(embeddings), labels)
            called = loss(as_features(embeddings), labels)
        torch.testing.assert_close(replayed, called)
        found, wanted = gradients(replayed, embeddings), gradients(called, embeddings)
        # Products under autocast round the gradient, here before it is scaled and there behind.
        assert (found - wanted).norm() <= (1e-2 if autocast else 1e-5) * wanted.norm()
    assert graphs.count == 1


def test_a_changed_setting_and_another_size_are_other_graphs(model: FastSentenceTransformer) -> None:
    loss, graphs = losses.MultipleNegativesRankingLoss(model), LossGraphs(torch.cuda.Stream())
    embeddings, _ = batch(2, 0, 0)
    for scale, rows in ((20.0, ROWS), (5.0, ROWS), (5.0, 3), (20.0, ROWS)):
        loss.scale = scale
        parts = [part[:rows] for part in embeddings]
        replayed = graphs(loss, settings_of(loss), as_features(parts), None)
        torch.testing.assert_close(replayed, loss(as_features(parts), None))
    assert graphs.count == 3


def test_two_losses_may_wait_for_their_backward(model: FastSentenceTransformer) -> None:
    loss, graphs = losses.MultipleNegativesRankingLoss(model), LossGraphs(torch.cuda.Stream())
    batches = [batch(2, 0, seed)[0] for seed in range(2)]
    values = [graphs(loss, settings_of(loss), as_features(parts), None) for parts in batches]
    for value, parts in zip(values, batches, strict=True):
        called = loss(as_features(parts), None)
        torch.testing.assert_close(gradients(value, parts), gradients(called, parts))


def test_a_recording_that_fails_leaves_those_before_it_as_they_were() -> None:
    states, stream, pool = torch.ones(64, device="cuda"), torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    first = torch.cuda.CUDAGraph()
    with record(first, pool, stream):
        dropped = torch.nn.functional.dropout(states)
    with pytest.raises(RuntimeError), record(torch.cuda.CUDAGraph(), pool, stream):
        torch.nn.functional.dropout(states).sum().item()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    drawn = []
    for _ in range(2):
        before = torch.cuda.get_rng_state()
        first.replay()
        drawn.append(dropped.clone())
        assert not torch.equal(torch.cuda.get_rng_state(), before)
    assert not torch.equal(*drawn)


def test_what_cannot_be_recorded_is_called(model: FastSentenceTransformer) -> None:
    def asks(features: list[dict[str, Any]], _labels: Tensor | None) -> Tensor:
        return features[0]["sentence_embedding"].sum() * features[1]["sentence_embedding"].sum().item()

    embeddings, _ = batch(2, 0, 0)
    wanted = asks(as_features(embeddings), None)
    graphs = LossGraphs(torch.cuda.Stream(), strict=False)
    with pytest.warns(match="the loss goes without"):
        found = graphs(asks, (), as_features(embeddings), None)
    torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        assert not graphs(asks, (), as_features(embeddings), None).requires_grad
    first = torch.randn(3, device="cuda")  # which a recording that broke off must not keep from being drawn
    assert not torch.equal(torch.randn(3, device="cuda"), first)
