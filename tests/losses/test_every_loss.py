"""Every loss that sentence-transformers exports: the same value and gradients on packed rows as on padded batches."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from tiny import TEXTS

from embtune import FastSentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments, losses
from embtune.losses.one_pass import ONE_PASS, takes_one_pass

TinyDir = Callable[..., Path]
ROWS = 6
ANCHORS = [f"question {i} about {TEXTS[i][:30]}" for i in range(ROWS)]
POSITIVES = [f"answer {i}: {TEXTS[(i + 3) % 11]}" for i in range(ROWS)]
NEGATIVES = [f"unrelated {i} {TEXTS[(i + 5) % 11]}" for i in range(ROWS)]
PAIRS = {"anchor": ANCHORS, "positive": POSITIVES}
TRIPLETS = {**PAIRS, "negative": NEGATIVES}
SCORED = {"sentence1": ANCHORS, "sentence2": POSITIVES, "score": [i / ROWS for i in range(ROWS)]}
MARKED = {"sentence1": ANCHORS, "sentence2": POSITIVES, "label": [i % 2 for i in range(ROWS)]}
# Negatives as near as can be and positives as far: the loss looks at nothing but pairs on the wrong side of the others.
HARD = {**PAIRS, "positive": [text if i % 2 else POSITIVES[i] for i, text in enumerate(ANCHORS)], "label": [1, 0] * 3}
CLASSES = {"sentence": ANCHORS + POSITIVES, "label": [0, 1, 2] * 4}
SINGLE = {"text": ANCHORS, "label": [[0.1 * i + j / 32 for j in range(32)] for i in range(ROWS)]}
MARGINS = {**TRIPLETS, "label": [0.1 * i for i in range(ROWS)]}
LISTS = {**TRIPLETS, "label": [[0.9, 0.1 * i] for i in range(ROWS)]}

Case = tuple[dict[str, list[Any]], Callable[[Any, Any], torch.nn.Module]]


def mnrl(model: Any) -> torch.nn.Module:
    return losses.MultipleNegativesRankingLoss(model)


CASES: dict[str, Case] = {
    "AdaptiveLayerLoss": (PAIRS, lambda m, _: losses.AdaptiveLayerLoss(m, mnrl(m), n_layers_per_step=-1)),
    "AnglELoss": (SCORED, lambda m, _: losses.AnglELoss(m)),
    "BatchAllTripletLoss": (CLASSES, lambda m, _: losses.BatchAllTripletLoss(m)),
    "BatchHardSoftMarginTripletLoss": (CLASSES, lambda m, _: losses.BatchHardSoftMarginTripletLoss(m)),
    "BatchHardTripletLoss": (CLASSES, lambda m, _: losses.BatchHardTripletLoss(m)),
    "BatchSemiHardTripletLoss": (CLASSES, lambda m, _: losses.BatchSemiHardTripletLoss(m)),
    "CachedGISTEmbedLoss": (TRIPLETS, lambda m, g: losses.CachedGISTEmbedLoss(m, g, mini_batch_size=4)),
    "CachedMultipleNegativesRankingLoss": (
        TRIPLETS,
        lambda m, _: losses.CachedMultipleNegativesRankingLoss(m, mini_batch_size=4),
    ),
    "CoSENTLoss": (SCORED, lambda m, _: losses.CoSENTLoss(m)),
    "ContrastiveLoss": (MARKED, lambda m, _: losses.ContrastiveLoss(m)),
    "CosineSimilarityLoss": (SCORED, lambda m, _: losses.CosineSimilarityLoss(m)),
    "DistillKLDivLoss": (LISTS, lambda m, _: losses.DistillKLDivLoss(m)),
    "GISTEmbedLoss": (TRIPLETS, lambda m, g: losses.GISTEmbedLoss(m, g)),
    "GlobalOrthogonalRegularizationLoss": (TRIPLETS, lambda m, _: losses.GlobalOrthogonalRegularizationLoss(m)),
    "MSELoss": (SINGLE, lambda m, _: losses.MSELoss(m)),
    "MarginMSELoss": (MARGINS, lambda m, _: losses.MarginMSELoss(m)),
    "Matryoshka2dLoss": (
        PAIRS,
        lambda m, _: losses.Matryoshka2dLoss(m, mnrl(m), [32, 16], n_layers_per_step=-1, n_dims_per_step=-1),
    ),
    "MatryoshkaLoss": (TRIPLETS, lambda m, _: losses.MatryoshkaLoss(m, mnrl(m), [32, 16, 8])),
    "MegaBatchMarginLoss": (PAIRS, lambda m, _: losses.MegaBatchMarginLoss(m, mini_batch_size=3)),
    "MultipleNegativesRankingLoss": (TRIPLETS, lambda m, _: mnrl(m)),
    "OnlineContrastiveLoss": (HARD, lambda m, _: losses.OnlineContrastiveLoss(m)),
    "SoftmaxLoss": (MARKED, lambda m, _: losses.SoftmaxLoss(m, 32, num_labels=2)),
    "TripletLoss": (TRIPLETS, lambda m, _: losses.TripletLoss(m)),
}
# Not run here: deprecated names of losses above, one that brings its own data loader, one that copies the model into
# its constructor and trains the copy, one that needs a decoder, and one that stands on a teacher's embeddings.
ELSEWHERE = {
    "CachedMultipleNegativesSymmetricRankingLoss",
    "ContrastiveTensionLoss",
    "ContrastiveTensionLossInBatchNegatives",
    "DenoisingAutoEncoderLoss",
    "EmbedDistillLoss",
    "MultipleNegativesSymmetricRankingLoss",
}


class OwnLoss(torch.nn.Module):
    """A user's own: the distance of each pair, asked of the model under a name of its own."""

    def __init__(self, encoder: SentenceTransformer) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, columns: list[dict[str, Any]], _labels: Any) -> torch.Tensor:
        first, second = (self.encoder(dict(features))["sentence_embedding"] for features in columns)
        return (first - second).square().sum(1).mean()


def step(name: str, engine: str, folder: Path, tmp_path: Path) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss of one batch and the gradients it leaves, through the trainer."""
    data, make = (PAIRS, lambda m, _: OwnLoss(m)) if name == "OwnLoss" else CASES[name]
    model = FastSentenceTransformer.from_pretrained(
        folder, dtype="float32", device="cpu", engine=engine, full_finetuning=True
    )
    guide = SentenceTransformer(str(folder), device="cpu").eval()
    torch.manual_seed(0)
    loss = make(model, guide)
    args = SentenceTransformerTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=Dataset.from_dict(data), loss=loss)
    batch = trainer.data_collator(list(trainer.train_dataset))
    model.eval()
    assert model.packs == (engine == "packed")
    value = trainer.compute_loss(model, batch)
    value.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return value.detach(), gradients


@pytest.mark.parametrize("name", [*CASES, "OwnLoss"])
@pytest.mark.filterwarnings("ignore:.*:UserWarning:sentence_transformers")
def test_value_and_gradients(name: str, tiny_dir: TinyDir, tmp_path: Path) -> None:
    packed, packed_gradients = step(name, "packed", tiny_dir("bert"), tmp_path)
    padded, padded_gradients = step(name, "reference", tiny_dir("bert"), tmp_path)
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)
    assert len(packed_gradients) == len(padded_gradients) > 0
    ours, expected = (torch.cat([g.flatten() for g in part]) for part in (packed_gradients, padded_gradients))
    assert expected.norm() > 0
    assert (ours - expected).norm() <= 1e-4 * expected.norm()


def test_no_loss_was_forgotten() -> None:
    exported = {name for name in losses.__all__ if inspect.isclass(getattr(losses, name)) and name.endswith("Loss")}
    assert exported - set(CASES) <= ELSEWHERE | {"ContrastiveTensionLossInBatchNegatives"}


def test_only_known_losses_are_handed_embeddings() -> None:
    model = torch.nn.Identity()
    assert not takes_one_pass(OwnLoss(model))

    class Derived(losses.CoSENTLoss):
        """May do anything in its forward."""

    assert losses.CoSENTLoss in ONE_PASS
    assert Derived not in ONE_PASS
