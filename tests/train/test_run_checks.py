"""Runs that would learn nothing are refused, those that would learn little are warned of."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback

from embtune import FastSentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments, losses
from embtune.errors import ArgumentError, PreflightWarning
from embtune.train.run_checks import check_learning_rates, check_lengths, check_rows_of_batch

TinyDir = Callable[..., Path]


def arguments(folder: Path, batch_size: int = 1, **settings: Any) -> SentenceTransformerTrainingArguments:
    settings = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, **settings}
    return SentenceTransformerTrainingArguments(str(folder), per_device_train_batch_size=batch_size, **settings)


def rows(count: int, *more: str) -> Dataset:
    names = ("anchor", "positive", *more)
    return Dataset.from_dict({name: [f"{name} of number {row}" for row in range(count)] for name in names})


@pytest.fixture(scope="module")
def model(tiny_dir: TinyDir) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_dir("bert")), device="cpu").eval()


COMPARE_ROWS = (
    *("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss", "GISTEmbedLoss", "CachedGISTEmbedLoss"),
    *("MegaBatchMarginLoss", "GlobalOrthogonalRegularizationLoss", "ContrastiveTensionLossInBatchNegatives"),
    *("CoSENTLoss", "AnglELoss", "OnlineContrastiveLoss"),
    *("BatchAllTripletLoss", "BatchHardTripletLoss", "BatchHardSoftMarginTripletLoss", "BatchSemiHardTripletLoss"),
)
OTHERS = ("CosineSimilarityLoss", "ContrastiveLoss", "TripletLoss", "DenoisingAutoEncoderLoss", "MarginMSELoss")


@pytest.mark.parametrize("name", [*COMPARE_ROWS, *OTHERS])
def test_a_loss_that_compares_rows_is_refused_one_row_at_a_time(
    name: str, model: SentenceTransformer, tmp_path: Path
) -> None:
    loss = getattr(losses, name)(model, *([model] if "GIST" in name else []))
    args = arguments(tmp_path)
    if name in OTHERS:
        check_rows_of_batch({"": rows(3)}, {"": loss}, args)
        return
    with pytest.raises(ArgumentError, match=f"Every batch has one row, and {name} compares.*is constant"):
        check_rows_of_batch({"": rows(3)}, {"": loss}, args)
    features = [model.preprocess([text]) for text in ("an anchor", "a positive")]
    label = torch.tensor([1])
    value = loss(features[: 1 if "Batch" in name and "Triplet" in name else 2], label)
    value = sum(value.values()) if isinstance(value, dict) else value
    if value.requires_grad:  # the refusal is right: there is no gradient
        value.backward()
    assert all(weight.grad is None or not weight.grad.any() for weight in model.parameters())
    model.zero_grad()


def test_negatives_of_the_row_or_another_data_set_still_teach(model: SentenceTransformer, tmp_path: Path) -> None:
    loss = losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [32, 16])
    with pytest.warns(PreflightWarning, match="MultipleNegativesRankingLoss compares.* own negatives alone"):
        check_rows_of_batch({"": rows(3, "negative")}, {"": loss}, arguments(tmp_path))
    parts = {"one": rows(1), "many": rows(9)}
    with pytest.warns(PreflightWarning, match="of the data set 'one' has one row.*nothing is learned"):
        check_rows_of_batch(parts, dict.fromkeys(parts, loss), arguments(tmp_path, batch_size=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_rows_of_batch({"": rows(3)}, {"": loss}, arguments(tmp_path, batch_size=2))


def test_texts_that_lose_everything_are_refused_and_cut_ones_counted(model: SentenceTransformer) -> None:
    model = SentenceTransformer(modules=list(model), device="cpu")
    whole = model.max_seq_length
    model.max_seq_length = 2
    with pytest.raises(ArgumentError, match="max_seq_length=2 leaves no token of any text: each has 2 special tokens"):
        check_lengths(model, "", rows(3), None)
    model.max_seq_length = 3
    with pytest.warns(PreflightWarning, match="max_seq_length=3 cuts 100% of the texts of the data set 'faq'"):
        check_lengths(model, "faq", rows(3), None)
    longer = 2 + len(model.tokenizer.tokenize("query: "))
    model.max_seq_length = longer
    for prompts in ("query: ", {"anchor": "query: "}, {"faq": {"anchor": "query: "}}):
        with pytest.raises(ArgumentError, match=f"{longer} special tokens and tokens of the prompt 'query: '"):
            check_lengths(model, "faq", rows(3), prompts)
    model.max_seq_length = whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_lengths(model, "", rows(300), None)


class Rates(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, *_args: Any, optimizer: torch.optim.Optimizer, **_kwargs: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({"max_steps": 1, "warmup_steps": 0.1}, True),
        ({"max_steps": 2, "warmup_steps": 0.1}, False),
        ({"max_steps": 1, "warmup_steps": 0}, False),
        ({"max_steps": 1, "warmup_steps": 0.1, "lr_scheduler_type": "constant"}, False),
        ({"max_steps": 1, "warmup_steps": 1, "lr_scheduler_type": "constant_with_warmup"}, True),
        ({"max_steps": 2, "learning_rate": 0.0}, True),
    ],
    ids=str,
)
def test_a_learning_rate_that_never_leaves_zero(
    settings: dict[str, Any], idle: bool, tiny_dir: TinyDir, tmp_path: Path
) -> None:
    model = FastSentenceTransformer.get_peft_model(FastSentenceTransformer.from_pretrained(tiny_dir("bert")), r=2)
    rates = Rates()
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments(tmp_path, batch_size=4, **settings),
        train_dataset=rows(8),
        loss=losses.MultipleNegativesRankingLoss(model),
        callbacks=[rates],
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    found = [str(each.message) for each in caught if issubclass(each.category, PreflightWarning)]
    assert rates.seen and any(rates.seen) is not idle
    assert [("The learning rate is 0 in" in text and "warmup_steps=0" in text) for text in found] == [True] * idle


def test_a_long_run_is_not_gone_through(tmp_path: Path) -> None:
    check_learning_rates(arguments(tmp_path, warmup_steps=0.1), steps=10**12)


def test_the_trainer_refuses_before_the_first_step(tiny_dir: TinyDir, tmp_path: Path) -> None:
    model = FastSentenceTransformer.get_peft_model(FastSentenceTransformer.from_pretrained(tiny_dir("bert")), r=2)
    loss = losses.MultipleNegativesRankingLoss(model)
    for data in (rows(1), DatasetDict(one=rows(1), other=rows(1))):
        trainer = SentenceTransformerTrainer(model=model, args=arguments(tmp_path), train_dataset=data, loss=loss)
        with pytest.raises(ArgumentError, match="nothing is learned"):
            trainer.train()
