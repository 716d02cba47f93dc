"""What a loss learns itself is part of a checkpoint: resumed runs and the best model have it too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from tiny import TEXTS
from torch import nn

from embtune import FastSentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from embtune.errors import ModelError
from embtune.losses import CoSENTLoss, GISTEmbedLoss, MultipleNegativesRankingLoss, SoftmaxLoss
from embtune.train.checkpoints import LOSS_WEIGHTS

TinyDir = Callable[..., Path]
SENTENCES = {"sentence1": [f"text {i}" for i in range(16)], "sentence2": (TEXTS * 2)[:16]}
CLASSES = Dataset.from_dict({**SENTENCES, "label": [i % 3 for i in range(16)]})
SCORES = Dataset.from_dict({**SENTENCES, "score": [i / 16 for i in range(16)]})
PAIRS = Dataset.from_dict({"anchor": SENTENCES["sentence1"], "positive": SENTENCES["sentence2"]})


def load(folder: Path) -> FastSentenceTransformer:
    model = FastSentenceTransformer.from_pretrained(folder, dtype="float32", device="cpu")
    return FastSentenceTransformer.get_peft_model(model, r=4)


def softmax(model: SentenceTransformer, seed: int) -> SoftmaxLoss:
    torch.manual_seed(seed)
    return SoftmaxLoss(model, 32, num_labels=3)


def trainer(model: SentenceTransformer, loss: Any, data: Any, folder: Path, **settings: Any) -> Any:
    defaults: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.01,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    evaluator = settings.pop("evaluator", None)
    args = SentenceTransformerTrainingArguments(str(folder), **{**defaults, **settings})
    return SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss, evaluator=evaluator)


@pytest.mark.parametrize("several", [False, True])
def test_a_resumed_run_ends_with_the_very_same_weights_of_model_and_loss(
    several: bool, tiny_dir: TinyDir, tmp_path: Path
) -> None:
    ends = []
    for resumed in (False, True):
        model = load(tiny_dir("bert"))
        classifier = softmax(
            model, seed=int(resumed)
        )  # the second run begins with other weights, and must not keep them
        loss: Any = {"classes": classifier, "scores": CoSENTLoss(model)} if several else classifier
        data: Any = {"classes": CLASSES, "scores": SCORES} if several else CLASSES
        run = trainer(model, loss, data, tmp_path)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resumed else None)
        trained = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
        ends.append({**trained, "classifier": classifier.classifier.weight.detach().clone()})
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())
    saved = load_file(tmp_path / "checkpoint-4" / LOSS_WEIGHTS)
    name = "classes.classifier" if several else "classifier"
    assert set(saved) == {f"{name}.weight", f"{name}.bias"}
    assert torch.equal(saved[f"{name}.weight"], ends[0]["classifier"])


class Falling(BaseEvaluator):
    """Judges every later state worse: the first checkpoint is the best."""

    primary_metric = "score"
    seen = 0

    def __call__(self, *_: object, **__: object) -> dict[str, float]:
        self.seen += 1
        return {"score": -float(self.seen)}


def test_the_best_model_comes_back_with_its_loss(tiny_dir: TinyDir, tmp_path: Path) -> None:
    model = load(tiny_dir("bert"))
    loss = softmax(model, seed=0)
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    run = trainer(model, loss, CLASSES, tmp_path, **settings, metric_for_best_model="eval_score", evaluator=Falling())
    run.train()
    first, last = (load_file(tmp_path / f"checkpoint-{step}" / LOSS_WEIGHTS) for step in (2, 4))
    assert torch.equal(loss.classifier.weight, first["classifier.weight"])
    assert not torch.equal(loss.classifier.weight, last["classifier.weight"])


def test_another_loss_than_in_the_first_run_is_refused(tiny_dir: TinyDir, tmp_path: Path) -> None:
    model = load(tiny_dir("bert"))
    trainer(model, softmax(model, seed=0), CLASSES, tmp_path).train()
    for loss, found in ((SoftmaxLoss(model, 32, num_labels=4), r"\(4, 96\)"), (CoSENTLoss(model), "has none")):
        with pytest.raises(ModelError, match=f"holds these weights of its loss.*{found}"):
            trainer(model, loss, CLASSES, tmp_path, max_steps=6).train(resume_from_checkpoint=True)


class Tempered(nn.Module):
    """A user's own loss: another loss inside, a number that is learnt, and one that is counted."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.inner = MultipleNegativesRankingLoss(model)
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, columns: list[dict[str, Any]], labels: Any) -> torch.Tensor:
        self.calls += 1
        return self.inner(columns, labels) * self.weight


def test_only_what_the_loss_owns_is_stored(tiny_dir: TinyDir, tmp_path: Path) -> None:
    model = load(tiny_dir("bert"))
    own = Tempered(model)
    trainer(model, own, PAIRS, tmp_path / "own").train()
    saved = load_file(tmp_path / "own" / "checkpoint-2" / LOSS_WEIGHTS)
    assert set(saved) == {"weight", "calls"} and saved["calls"] == 2 and own.calls == 4
    guided = GISTEmbedLoss(model, SentenceTransformer(str(tiny_dir("bert")), device="cpu"))
    run = trainer(model, guided, PAIRS, tmp_path / "guided")
    run.train()
    assert not list((tmp_path / "guided").rglob(LOSS_WEIGHTS))
    run.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model" / LOSS_WEIGHTS).exists()
