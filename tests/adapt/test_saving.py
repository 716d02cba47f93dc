"""Adapters and merged encoders on disk: whole, equal to what is in memory, and never beside the other kind."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tiny import TEXTS, tiny_backbone, wordpiece
from transformers import AutoModel, BertForMaskedLM

from embtune import FastModel, FastSentenceTransformer
from embtune.adapt.lora import AdaptedEncoder, LoraSettings, attach_lora
from embtune.adapt.saving import check_read_back
from embtune.errors import ArgumentError, ExportError, ModelError

# PEFT asks transformers models for a property under the name that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TinyDir = Callable[..., Path]


def _randomise(model: torch.nn.Module) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)


def _adapted(model_type: str = "bert") -> AdaptedEncoder:
    adapted = attach_lora(tiny_backbone(model_type), LoraSettings(r=4))
    _randomise(adapted)
    return adapted


def _states(encoder: Any) -> torch.Tensor:
    with torch.no_grad():
        return encoder(**wordpiece()(TEXTS[:3], padding=True, return_tensors="pt")).last_hidden_state


def test_an_adapter_is_saved_and_saved_again(tmp_path: Path) -> None:
    adapted = _adapted()
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMy own words.\n")
    (folder / "notes.txt").write_text("kept")
    adapted.save_pretrained(folder)
    assert "My own words." in (folder / "README.md").read_text()
    assert (folder / "notes.txt").read_text() == "kept"
    assert list(tmp_path.iterdir()) == [folder]
    again = PeftModel.from_pretrained(tiny_backbone("bert"), folder)
    torch.testing.assert_close(_states(again), _states(adapted.eval()), rtol=0, atol=0)


def test_every_adapter_is_read_back(tmp_path: Path) -> None:
    adapted = _adapted()
    adapted.add_adapter("second", LoraConfig(r=2, target_modules=["query"], task_type="FEATURE_EXTRACTION"))
    adapted.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / "second" / "adapter_model.safetensors").exists()
    adapted.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    assert not (tmp_path / "one" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("merged", [False, True])
def test_a_save_that_fails_or_is_not_equal_leaves_the_earlier_one(
    tmp_path: Path, merged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The libraries below write something else than they were given, as a full disk or a bug would."""
    adapted = _adapted()
    if merged:
        adapted.merge_and_unload()
    folder = tmp_path / "model"
    adapted.save_pretrained(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*")}
    owner = type(adapted.get_base_model()) if merged else PeftModel
    original = owner.save_pretrained

    def spoiled(model: Any, path: Any, **options: Any) -> None:
        original(model, path, **options)
        [file] = Path(path).glob("*.safetensors")
        tensors = load_file(file)
        next(iter(tensors.values())).flatten()[0] += 1
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(owner, "save_pretrained", spoiled)
    with pytest.raises(ExportError, match=r"model\.safetensors, read back, does not hold .* as it is in memory"):
        adapted.save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*")} == before
    assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(ExportError, match="read back"):
        adapted.save_pretrained(tmp_path / "new")
    assert list(tmp_path.iterdir()) == [folder]


def test_what_is_read_back_is_compared_bit_for_bit(tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([1.0, float("nan")]), "b": torch.tensor(2, dtype=torch.int8), "c": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    check_read_back(tensors, tmp_path)
    for wrong in ({"a": torch.tensor([1.0, 2.0])}, {"b": torch.tensor(2)}, {"c": torch.zeros(3, 0)}):
        with pytest.raises(ExportError, match="does not hold"):
            check_read_back({**tensors, **wrong}, tmp_path)
    with pytest.raises(ExportError, match="does not hold c"):
        check_read_back({"a": tensors["a"], "b": tensors["b"]}, tmp_path)
    with pytest.raises(ExportError, match="lack d"):
        check_read_back({**tensors, "d": tensors["a"]}, tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ExportError, match=r"model\.safetensors cannot be read back"):
        check_read_back(tensors, tmp_path)


@pytest.mark.parametrize("model_type", ["bert", "nomic_bert"])
def test_a_merged_encoder_replaces_its_own_shards(tmp_path: Path, model_type: str) -> None:
    encoder = _adapted(model_type).merge_and_unload()
    folder = tmp_path / "encoder"
    for size in ("20KB", "40KB", "5GB", "20KB"):
        encoder.save_pretrained(folder, max_shard_size=size)
        shards = list(folder.glob("*.safetensors"))
        assert (len(shards) > 1) == (size != "5GB") == (folder / "model.safetensors.index.json").exists()
        names = [name for shard in shards for name in load_file(shard)]
        assert len(names) == len(set(names))
        torch.testing.assert_close(_states(AutoModel.from_pretrained(folder)), _states(encoder.eval()))
    assert list(tmp_path.iterdir()) == [folder]


def test_a_merged_encoder_refuses_folders_of_the_other_kinds(tmp_path: Path, tiny_dir: TinyDir) -> None:
    adapted = _adapted()
    adapted.save_pretrained(tmp_path / "adapter")
    encoder = adapted.merge_and_unload()
    SentenceTransformer(str(tiny_dir("bert")), device="cpu").save_pretrained(str(tmp_path / "whole"))
    for model in (encoder, adapted, copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        with pytest.raises(ArgumentError, match=r"adapter_config\.json"):
            model.save_pretrained(tmp_path / "adapter")
        with pytest.raises(ArgumentError, match="holds a sentence-transformers model"):
            model.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "adapter" / "model.safetensors").exists() is False
    clone = copy.deepcopy(encoder)
    with torch.no_grad():
        next(clone.parameters()).zero_()
    clone.save_pretrained(tmp_path / "clone")
    assert not AutoModel.from_pretrained(tmp_path / "clone").get_input_embeddings().weight.any()
    assert type(encoder).__name__ == "BertModel"


def test_options_that_cannot_be_honoured_are_refused(tmp_path: Path) -> None:
    adapted = _adapted()
    for merged in (False, True):
        if merged:
            adapted.merge_and_unload()
        with pytest.raises(ArgumentError, match="safe_serialization=False"):
            adapted.save_pretrained(tmp_path / "model", safe_serialization=False)
        with pytest.raises(ArgumentError, match="push_to_hub=True"):
            adapted.save_pretrained(tmp_path / "model", push_to_hub=True)
        adapted.save_pretrained(tmp_path / "model", is_main_process=False)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bare", [False, True])
def test_an_adapter_of_plain_peft_is_continued(tmp_path: Path, tiny_dir: TinyDir, bare: bool) -> None:
    base = AutoModel.from_pretrained(tiny_dir("bert"))
    plain = get_peft_model(base, LoraConfig(r=4, target_modules=["query", "value"]))
    _randomise(plain)
    plain.save_pretrained(tmp_path / "adapter")
    assert '"task_type": null' in (tmp_path / "adapter" / "adapter_config.json").read_text()
    if bare:
        continued, _ = FastModel.from_pretrained(tmp_path / "adapter", dtype="float32", device="cpu")
    else:
        model = FastSentenceTransformer.from_pretrained(tmp_path / "adapter", dtype="float32", device="cpu")
        continued = model[0].model
    assert isinstance(continued, AdaptedEncoder)
    assert any(parameter.requires_grad for parameter in continued.parameters())
    torch.testing.assert_close(_states(continued.eval()), _states(plain.eval()))


def test_an_adapter_of_another_class_is_refused(tmp_path: Path, tiny_dir: TinyDir) -> None:
    """Its names in the file have a prefix more; PEFT would go on with an untrained adapter."""
    plain = get_peft_model(BertForMaskedLM.from_pretrained(tiny_dir("bert")), LoraConfig(target_modules=["query"]))
    plain.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="does not fit its base model: Found missing adapter keys"):
        FastSentenceTransformer.from_pretrained(tmp_path, dtype="float32", device="cpu")


def test_a_fully_trained_encoder_is_saved_whole_too(tmp_path: Path, tiny_dir: TinyDir) -> None:
    encoder, _ = FastModel.from_pretrained(
        tiny_dir("bert", bare=True), dtype="float32", full_finetuning=True, device="cpu"
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_text("{}")
    with pytest.raises(ArgumentError, match=r"adapter_config\.json"):
        encoder.save_pretrained(tmp_path / "other")
    encoder.save_pretrained(tmp_path / "encoder")
    again = AutoModel.from_pretrained(tmp_path / "encoder")
    torch.testing.assert_close(_states(again), _states(encoder.eval()), rtol=0, atol=0)
