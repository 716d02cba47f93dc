"""Every loss that sentence-transformers exports: the same value and gradients on packed rows as on padded batches."""

import copy
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
from embtune.errors import EmbtuneWarning
from embtune.losses.services import SERVICES, Service, is_known, service_of

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
# Some pairs of one text with itself, some of two: ContrastiveTension tells them apart by their tokens.
TENSE = {"sentence1": ANCHORS, "sentence2": [*ANCHORS[:3], *POSITIVES[3:]]}
TAUGHT = {**PAIRS, "label": [[0.1 * i + j / 32 for j in range(32)] for i in range(ROWS)]}
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
    "CachedMultipleNegativesSymmetricRankingLoss": (
        PAIRS,
        lambda m, _: losses.CachedMultipleNegativesSymmetricRankingLoss(m, mini_batch_size=4),
    ),
    "CoSENTLoss": (SCORED, lambda m, _: losses.CoSENTLoss(m)),
    "ContrastiveTensionLoss": (TENSE, lambda m, _: losses.ContrastiveTensionLoss(m)),
    "ContrastiveTensionLossInBatchNegatives": (
        {"sentence": TEXTS[:ROWS]},
        lambda m, _: losses.ContrastiveTensionLossInBatchNegatives(m),
    ),
    "ContrastiveLoss": (MARKED, lambda m, _: losses.ContrastiveLoss(m)),
    "CosineSimilarityLoss": (SCORED, lambda m, _: losses.CosineSimilarityLoss(m)),
    "DenoisingAutoEncoderLoss": (PAIRS, lambda m, _: losses.DenoisingAutoEncoderLoss(m)),
    "DistillKLDivLoss": (LISTS, lambda m, _: losses.DistillKLDivLoss(m)),
    "EmbedDistillLoss": (TAUGHT, lambda m, _: losses.EmbedDistillLoss(m, "l2")),
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
    "MultipleNegativesSymmetricRankingLoss": (
        PAIRS,
        lambda m, _: losses.MultipleNegativesSymmetricRankingLoss(m),
    ),
    "OnlineContrastiveLoss": (HARD, lambda m, _: losses.OnlineContrastiveLoss(m)),
    "SoftmaxLoss": (MARKED, lambda m, _: losses.SoftmaxLoss(m, 32, num_labels=2)),
    "TripletLoss": (TRIPLETS, lambda m, _: losses.TripletLoss(m)),
}


class OwnLoss(torch.nn.Module):
    """A user's own: the distance of each pair, asked of the model under a name of its own."""

    def __init__(self, encoder: SentenceTransformer) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, columns: list[dict[str, Any]], _labels: Any) -> torch.Tensor:
        first, second = (self.encoder(dict(features))["sentence_embedding"] for features in columns)
        return (first - second).square().sum(1).mean()


class NastyLoss(torch.nn.Module):
    """Finds the model by walking its attributes, copies it, runs its modules one by one and tokenises by itself."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.parts = {"deep": [model]}
        self.before = copy.deepcopy(model)

    def forward(self, columns: list[dict[str, Any]], _labels: Any) -> torch.Tensor:
        (model,) = (value[0] for name, value in self.parts.items() if name == "deep")
        whole = model(dict(columns[0]))["sentence_embedding"]
        features = dict(columns[1])
        for module in model:
            features = module(features)
        again = model.tokenizer(model.tokenizer.batch_decode(columns[0]["input_ids"], skip_special_tokens=True))
        inside = model[0].model(**model.tokenizer.pad(again, return_tensors="pt")).last_hidden_state[:, 0]
        with torch.no_grad():
            before = self.before(columns[1])["sentence_embedding"]
        distance = (whole - features["sentence_embedding"]).square().sum() + (whole - before).abs().sum()
        return distance + 0.01 * inside.square().sum() + features["token_embeddings"][:, 1].sum()


class ListeningLoss(OwnLoss):
    """Reads the first token of a module inside, where a packed row has only one first token."""

    def __init__(self, encoder: SentenceTransformer, place: str = "encoder.layer.0") -> None:
        super().__init__(encoder)
        encoder[0].model.get_submodule(place).register_forward_hook(self.listen)

    def listen(self, _module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        self.first = output[:, 0]

    def forward(self, columns: list[dict[str, Any]], labels: Any) -> torch.Tensor:
        return super().forward(columns, labels) + self.first.square().sum()


OWN: dict[str, Case] = {
    "OwnLoss": (PAIRS, lambda m, _: OwnLoss(m)),
    "NastyLoss": (PAIRS, lambda m, _: NastyLoss(m)),
    # A guide of the student's own vocabulary and kind: it must be asked, and never be handed the student's embeddings.
    "GISTEmbedLoss guided by a packed model": (TRIPLETS, lambda m, _: losses.GISTEmbedLoss(m, packed_guide(m))),
    "MatryoshkaLoss of a user's own": (PAIRS, lambda m, _: losses.MatryoshkaLoss(m, ModelLoss(m), [32, 8])),
}


class ModelLoss(OwnLoss):
    """Matryoshka losses want the loss inside to know the model as `model`."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__(model)
        self.model = model


def packed_guide(model: SentenceTransformer) -> FastSentenceTransformer:
    """A model of other weights than the student's, on the student's engine."""
    guide = copy.deepcopy(model).eval().requires_grad_(False)
    for parameter in guide.parameters():
        parameter.mul_(1.3)
    return guide


def trainer_for(data: Any, make: Any, engine: str, folder: Path, tmp_path: Path) -> SentenceTransformerTrainer:
    model = FastSentenceTransformer.from_pretrained(
        folder, dtype="float32", device="cpu", engine=engine, full_finetuning=True
    )
    guide = SentenceTransformer(str(folder), device="cpu").eval()
    torch.manual_seed(0)
    loss = make(model, guide)
    args = SentenceTransformerTrainingArguments(str(tmp_path), report_to="none", use_cpu=True, token_cache=False)
    return SentenceTransformerTrainer(model=model, args=args, train_dataset=Dataset.from_dict(data), loss=loss)


def step(trainer: SentenceTransformerTrainer) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss of one batch and the gradients it leaves, with dropout off."""
    trainer.loss.eval()
    batch = trainer.data_collator(list(trainer.train_dataset))
    value = trainer.compute_loss(trainer.model, batch)
    value.backward()
    gradients = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
    return value.detach(), gradients


def assert_same_step(packed: SentenceTransformerTrainer, padded: SentenceTransformerTrainer) -> None:
    (value, gradients), (expected_value, expected_gradients) = step(packed), step(padded)
    torch.testing.assert_close(value, expected_value, rtol=1e-5, atol=1e-5)
    assert len(gradients) == len(expected_gradients) > 0
    ours, expected = (torch.cat([g.flatten() for g in part]) for part in (gradients, expected_gradients))
    assert expected.norm() > 0
    assert (ours - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("name", [*CASES, *OWN])
@pytest.mark.filterwarnings("ignore:.*:UserWarning:sentence_transformers")
@pytest.mark.filterwarnings("ignore:.*SymmetricRankingLoss is deprecated:DeprecationWarning")
def test_value_and_gradients(name: str, tiny_dir: TinyDir, tmp_path: Path) -> None:
    packed, padded = (
        trainer_for(*(CASES | OWN)[name], engine, tiny_dir("bert"), tmp_path) for engine in ("packed", "reference")
    )
    model, backbone = packed.model, packed.model[0].model
    assert model.packs and not padded.model.packs
    assert_same_step(packed, padded)
    # Nothing stood in for the model or its encoder while the loss was at work.
    assert packed.model is model and model[0].model is backbone and model.packs
    assert model.forward.__func__ is FastSentenceTransformer.forward


@pytest.mark.parametrize("name", ["ContrastiveTensionLoss", "DenoisingAutoEncoderLoss"])
def test_losses_with_a_second_model_train(name: str, tiny_dir: TinyDir, tmp_path: Path) -> None:
    """The optimizer must hold the weights that the packed forward reads, copied or tied as they are."""
    trainer = trainer_for(*CASES[name], "packed", tiny_dir("bert"), tmp_path)
    trainer.args.max_steps, trainer.args.per_device_train_batch_size = 2, ROWS
    before = trainer.model.encode(ANCHORS)
    trainer.train()
    assert trainer.model.packs
    assert abs(trainer.model.encode(ANCHORS) - before).max() > 1e-5


@pytest.mark.parametrize("engine", ["packed", "reference"])
@pytest.mark.parametrize("name", ["AdaptiveLayerLoss", "Matryoshka2dLoss"])
def test_losses_over_layers_reach_through_adapters(name: str, engine: str, tiny_dir: TinyDir) -> None:
    """PEFT's forward keeps an encoder from returning the states that its config asks for."""
    model = FastSentenceTransformer.from_pretrained(tiny_dir("bert"), dtype="float32", device="cpu", engine=engine)
    model = FastSentenceTransformer.get_peft_model(model, r=4)
    columns = [dict(model.preprocess(texts)) for texts in (ANCHORS, POSITIVES)]
    CASES[name][1](model, None)(columns, None).backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert gradients and all(gradient is not None and gradient.norm() > 0 for gradient in gradients)


@pytest.mark.parametrize(
    "make",
    [
        lambda m, _: ListeningLoss(m),
        lambda m, _: ListeningLoss(m, "embeddings"),
        lambda m, _: losses.MatryoshkaLoss(m, ListeningLoss(m), [32, 8]),
    ],
)
def test_a_loss_that_listens_inside_falls_back(make: Any, tiny_dir: TinyDir, tmp_path: Path) -> None:
    packed, padded = (
        trainer_for(PAIRS, make, engine, tiny_dir("bert"), tmp_path) for engine in ("packed", "reference")
    )
    with pytest.warns(EmbtuneWarning, match="^ListeningLoss may listen .* padded batches"):
        packed.get_train_dataloader()
    assert not packed.model.packs
    assert "ListeningLoss" in str(packed.model.explain())
    assert_same_step(packed, padded)


def test_hooks_alone_end_nothing(tiny_dir: TinyDir, tmp_path: Path) -> None:
    """Trackers hook models too; losses that are known never look."""
    trainer = trainer_for(PAIRS, lambda m, _: mnrl(m), "packed", tiny_dir("bert"), tmp_path)
    trainer.model[0].model.encoder.layer[0].register_forward_hook(lambda *_: None)
    trainer.get_train_dataloader()
    assert trainer.model.packs


def test_a_guide_is_given_padded_features(tiny_dir: TinyDir, tmp_path: Path) -> None:
    """A guide of the same vocabulary that received the student's flat row gave cosines of 0.65 without an error."""
    seen = []

    def make(model: Any, guide: Any) -> torch.nn.Module:
        guide[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]["attention_mask"].shape))
        return losses.GISTEmbedLoss(model, guide)

    trainer = trainer_for(TRIPLETS, make, "packed", tiny_dir("bert"), tmp_path)
    step(trainer)
    assert sum(rows for rows, _ in seen) == 3 * ROWS


def test_features_that_come_a_second_time_are_computed_again(tiny_dir: TinyDir) -> None:
    """Losses with two models hand both the same dict: the second's embedding must replace the first's."""
    model = FastSentenceTransformer.from_pretrained(tiny_dir("bert"), dtype="float32", device="cpu").eval()
    assert model.packs
    features = dict(model.preprocess(TEXTS))
    first = model(features)["sentence_embedding"]
    for parameter in model.parameters():
        parameter.data.mul_(1.3)
    second = model(features)["sentence_embedding"]
    assert not torch.allclose(first, second, atol=1e-3)
    torch.testing.assert_close(second, model(dict(model.preprocess(TEXTS)))["sentence_embedding"])


def test_the_table_has_every_loss() -> None:
    exported = [getattr(losses, name) for name in losses.__all__]
    exported = {cls.__name__ for cls in exported if inspect.isclass(cls) and issubclass(cls, torch.nn.Module)}
    assert exported <= set(SERVICES)
    assert exported <= set(CASES)


def test_only_known_losses_are_handed_embeddings() -> None:
    class CoSENTLoss(losses.CoSENTLoss):
        """May do anything in its forward, and bears the name of one that is known."""

    model = torch.nn.Identity()
    assert service_of(losses.CoSENTLoss(model)) is Service.PRECOMPUTED
    assert service_of(CoSENTLoss(model)) is service_of(OwnLoss(model)) is Service.CALLS
    assert not is_known(CoSENTLoss(model))
