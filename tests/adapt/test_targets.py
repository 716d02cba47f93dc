"""Which modules are adapted or trained whole: the same training, merge and files as with plain PEFT."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, PeftModelForFeatureExtraction
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from tiny import TEXTS
from torch import nn
from transformers import AutoModel, AutoTokenizer

from embtune import FastSentenceTransformer
from embtune.errors import ArgumentError
from embtune.losses import MultipleNegativesRankingLoss
from embtune.train.trainer import SentenceTransformerTrainer as OurTrainer

TinyDir = Callable[..., Path]
NEW = ["<task>", "<snippet>"]
# What is trained, and whether tokens were added to the vocabulary first.
CASES: list[tuple[dict[str, Any], bool]] = [
    ({"target_modules": ["word_embeddings"]}, True),
    ({"target_modules": ["query", "word_embeddings"]}, False),
    ({"target_modules": ["query"], "modules_to_save": ["embeddings"]}, True),
    ({"target_modules": ["query", "word_embeddings"], "modules_to_save": ["position_embeddings"]}, False),
]


def pairs() -> Dataset:
    anchors = [f"<task> {i} {TEXTS[i % 11][:20]}" for i in range(8)]
    return Dataset.from_dict({"anchor": anchors, "positive": [f"<snippet> {TEXTS[(i + 4) % 11]}" for i in range(8)]})


def without_dropout(model: SentenceTransformer) -> SentenceTransformer:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model[0].model.config.update({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    return model


def add_tokens(tokenizer: Any, backbone: nn.Module) -> None:
    tokenizer.add_tokens(NEW)
    torch.manual_seed(1)
    backbone.resize_token_embeddings(len(tokenizer))


def load(folder: Path, grown: bool, **settings: Any) -> FastSentenceTransformer:
    model = FastSentenceTransformer.from_pretrained(folder, dtype="float32", device="cpu")
    if grown:
        add_tokens(model.tokenizer, model[0].model)
    return FastSentenceTransformer.get_peft_model(model, r=4, **settings)


def train(trainer_class: type, model: SentenceTransformer, folder: Path) -> list[float]:
    args = SentenceTransformerTrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=8,
        learning_rate=0.01,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    loss = MultipleNegativesRankingLoss(model)
    trainer = trainer_class(model=model, args=args, train_dataset=pairs(), loss=loss)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def embed(model: SentenceTransformer) -> torch.Tensor:
    return torch.from_numpy(model.eval().encode([*TEXTS, "<task> of a <snippet>"]))


@pytest.mark.parametrize(("settings", "grown"), CASES, ids=str)
def test_embeddings_train_merge_and_load_as_in_plain_peft(
    settings: dict[str, Any], grown: bool, tiny_dir: TinyDir, tmp_path: Path
) -> None:
    ours = without_dropout(load(tiny_dir("bert"), grown, **settings))
    plain = SentenceTransformer(str(tiny_dir("bert")), device="cpu")
    if grown:
        add_tokens(plain.tokenizer, plain[0].model)
    plain[0].model = PeftModelForFeatureExtraction(plain[0].model, copy.deepcopy(ours[0].model.peft_config["default"]))
    plain.load_state_dict(ours.state_dict())
    without_dropout(plain)
    losses = [train(OurTrainer, ours, tmp_path), train(SentenceTransformerTrainer, plain, tmp_path)]
    assert losses[0][-1] < losses[0][0] - 0.05
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=0, atol=2e-5)
    trained = embed(ours)

    ours.save_pretrained(str(tmp_path / "adapter"))
    continued = FastSentenceTransformer.from_pretrained(tmp_path / "adapter", dtype="float32", device="cpu")
    torch.testing.assert_close(embed(continued), trained, rtol=0, atol=1e-5)
    base = AutoModel.from_pretrained(tiny_dir("bert"), dtype=torch.float32)
    base.resize_token_embeddings(len(AutoTokenizer.from_pretrained(tmp_path / "adapter")))
    by_peft = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    plain[0].model = by_peft
    torch.testing.assert_close(embed(plain), trained, rtol=0, atol=1e-5)

    merged = SentenceTransformer(str(ours.save_pretrained_merged(tmp_path / "merged")), device="cpu")
    torch.testing.assert_close(embed(merged), trained, rtol=0, atol=1e-5)
    plain[0].model = by_peft.merge_and_unload()
    torch.testing.assert_close(embed(plain), trained, rtol=0, atol=1e-5)


def adapted(model: FastSentenceTransformer) -> set[str]:
    named = model[0].model.get_base_model().named_modules()
    return {name for name, module in named if hasattr(module, "lora_A")}


def test_a_pattern_reaches_no_pooler(tiny_dir: TinyDir) -> None:
    dense = adapted(load(tiny_dir("bert"), False, target_modules=r".*dense"))
    assert len(dense) == 6 and not any("pooler" in name for name in dense)
    assert adapted(load(tiny_dir("bert"), False, target_modules="All-Linear")) == adapted(
        load(tiny_dir("bert"), False, target_modules=["query", "key", "value", "dense"])
    )
    assert adapted(load(tiny_dir("bert"), False, target_modules=r".*\.1\..*\.(query|key)")) == {
        "encoder.layer.1.attention.self.query",
        "encoder.layer.1.attention.self.key",
    }


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"target_modules": "["}, "no regular expression"),
        ({"target_modules": "pooler.dense"}, "PEFT refuses"),
        ({"target_modules": ["LayerNorm"]}, "PEFT refuses"),
        (
            {"target_modules": ["query", "word_embeddings"], "layers_to_transform": [0]},
            "no linear layer word_embeddings",
        ),
        ({"modules_to_save": ["embedding"]}, "no module named embedding"),
    ],
)
def test_targets_that_cannot_be_honoured_are_refused(settings: dict[str, Any], named: str, tiny_dir: TinyDir) -> None:
    with pytest.raises(ArgumentError, match=named):
        load(tiny_dir("bert"), False, **settings)


def test_modules_are_named_so_that_peft_takes_no_others(tiny_dir: TinyDir) -> None:
    model = load(tiny_dir("bert"), False, target_modules=["query"], modules_to_save=["embeddings", "pooler"])
    assert set(model[0].model.peft_config["default"].modules_to_save) == {
        "embeddings.word_embeddings",
        "embeddings.position_embeddings",
        "embeddings.token_type_embeddings",
        "embeddings.LayerNorm",
        "pooler",
    }
