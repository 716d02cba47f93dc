"""The model card that a described model is saved with."""

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from embtune import FastSentenceTransformer
from embtune.errors import ArgumentError
from embtune.export.card import DataFacts, MetricChange, add_section, describe_training

SETTINGS = {
    "lora_r": 16,
    "lora_alpha": 32,
    "target_modules": ["query", "key", "value"],
    "loss": "MultipleNegativesRankingLoss",
    "learning_rate": 5e-4,
    "dtype": "bfloat16",
    "engine": "reference",
}
METRICS = {
    "held-out": {"ndcg@10": MetricChange(0.56, 0.655, 0.07, 0.12), "mrr@10": MetricChange(0.5, 0.6, 0.05, 0.15)},
    "general": {"ndcg@10": MetricChange(0.7, 0.69)},
}


@pytest.fixture
def model(tiny_dir: Callable[..., Path]) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_dir("bert")), device="cpu")


def _card(model: SentenceTransformer, folder: Path) -> str:
    model.save_pretrained(str(folder))
    return (folder / "README.md").read_text()


def test_card_tells_settings_data_metrics_and_loading(model: SentenceTransformer, tmp_path: Path) -> None:
    data = [DataFacts("pairs.jsonl", 5413, ["anchor", "positive"])]
    describe_training(model, settings=SETTINGS, metrics=METRICS, base_model="ada/base", data=data)
    model.save_pretrained(str(tmp_path))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "ada/base"
    assert {"sentence-transformers", "embtune", "generated_from_trainer"} <= set(card.data.tags)
    assert "- `lora_r`: 16\n" in card.text
    assert "- `target_modules`: query, key, value\n" in card.text
    assert "finetuned from [ada/base](https://huggingface.co/ada/base) on the pairs.jsonl dataset" in card.text
    assert "* Size: 5,413 training samples\n* Columns: <code>anchor</code> and <code>positive</code>" in card.text
    assert "0.6550 (before: 0.5600, change +0.0950, 95% interval +0.0700 to +0.1200)" in card.text
    assert "0.6900 (before: 0.7000, change -0.0100)" in card.text
    assert "from sentence_transformers import SentenceTransformer" in card.text
    results = {(result.dataset_type, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert results == {("held-out", "ndcg@10"): 0.655, ("held-out", "mrr@10"): 0.6, ("general", "ndcg@10"): 0.69}


def test_second_description_replaces_the_first(model: SentenceTransformer, tmp_path: Path) -> None:
    describe_training(model, settings=SETTINGS, metrics=METRICS)
    describe_training(
        model, settings={"lora_r": 8}, metrics={"held-out": {"ndcg@10": MetricChange(0.1, 0.2)}}, library_tag=False
    )
    card = ModelCard(_card(model, tmp_path))
    assert "- `lora_r`: 8\n" in card.text
    assert "- `lora_r`: 16\n" not in card.text
    assert "0.2000 (before: 0.1000" in card.text
    assert "0.6550" not in card.text
    assert "embtune" not in card.data.tags


def test_local_base_is_named_without_its_path(model: SentenceTransformer, tmp_path: Path) -> None:
    base = tmp_path / "private-folder" / "my-base"
    base.mkdir(parents=True)
    describe_training(model, settings={}, base_model=str(base))
    text = _card(model, tmp_path)
    assert "- `base_model`: my-base\n" in text
    assert "private-folder" not in text
    assert ModelCard(text).data.base_model is None


def test_values_that_would_break_the_page_or_its_metadata(model: SentenceTransformer, tmp_path: Path) -> None:
    describe_training(
        model,
        settings={"note": "two\nlines --- : [", "targets": {"b", "a"}},
        metrics={"a: b\n- c": {"x: [y": MetricChange(0.0, 1.0)}},
    )
    card = ModelCard(_card(model, tmp_path))
    assert "- `note`: two lines --- : [\n- `targets`: a, b\n" in card.text
    assert card.data.eval_results[0].metric_type == "x: [y"


def test_trainers_own_notes_stay(model: SentenceTransformer, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"anchor": ["a", "b", "c", "d"], "positive": ["e", "f", "g", "h"]})
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=2,
        report_to="none",
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    loss = MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=rows, loss=loss).train()
    describe_training(model, settings={"lora_r": 4}, data=[DataFacts("mine.jsonl", 4, ["anchor", "positive"])])
    model.save_pretrained(str(tmp_path / "saved"))
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    assert "- `lora_r`: 4\n- `per_device_train_batch_size`: 2\n" in card.text
    assert "#### mine.jsonl\n" in card.text
    assert "* Approximate statistics based on the first 4 samples" in card.text
    assert "dataset_size:4" in card.data.tags


def test_added_section_stands_before_the_training(model: SentenceTransformer, tmp_path: Path) -> None:
    describe_training(model, settings={"lora_r": 4})
    _card(model, tmp_path)
    add_section(tmp_path, "Quantisation", "Eight bits.")
    text = (tmp_path / "README.md").read_text()
    assert "\n\n## Quantisation\n\nEight bits.\n\n## Training Details\n" in text
    (tmp_path / "README.md").write_text("# Short\n")
    add_section(tmp_path, "Quantisation", "Eight bits.")
    assert (tmp_path / "README.md").read_text() == "# Short\n\n## Quantisation\n\nEight bits.\n"


def test_bad_arguments_are_named(model: SentenceTransformer) -> None:
    with pytest.raises(ArgumentError, match=r"base_model='no such/folder/here' is neither a folder nor an id"):
        describe_training(model, settings={}, base_model="no such/folder/here")
    with pytest.raises(ArgumentError, match="both low and high"):
        MetricChange(0.1, 0.2, low=0.0)
    with pytest.raises(ArgumentError, match=r"low=0\.3 is above high=0\.1"):
        MetricChange(0.1, 0.2, low=0.3, high=0.1)
    assert "generated_from_trainer" not in model.model_card_data.tags


def test_a_card_names_the_folder_and_plain_classes(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = FastSentenceTransformer.from_pretrained(tiny_dir("bert"), device="cpu")
    FastSentenceTransformer.get_peft_model(model, r=2)
    merged = model.save_pretrained_merged(tmp_path / "my-model")
    model.save_pretrained(str(tmp_path / "adapter"))
    for folder, name in ((merged, "my-model"), (tmp_path / "adapter", "adapter")):
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert f'SentenceTransformer("{name}")' in card
        assert "\nSentenceTransformer(\n" in card
        for wrong in ("FastSentenceTransformer", "sentence_transformers_model_id", "Download from"):
            assert wrong not in card
    assert "'architecture': 'BertModel'" in (merged / "README.md").read_text(encoding="utf-8")
