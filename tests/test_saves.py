"""Saves through the doors: checked before they appear, over an earlier one, of Routers and of models with code."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Router
from tiny import HIDDEN, TEXTS, tiny_model_dir

from embtune import (
    FastModel,
    FastSentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from embtune.errors import ArgumentError, ExportError
from embtune.losses import MultipleNegativesRankingLoss

# PEFT asks transformers models for a property under the name that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TinyDir = Callable[..., Path]


def _load(folder: Path, **arguments: object) -> FastSentenceTransformer:
    return FastSentenceTransformer.from_pretrained(folder, **{"dtype": "float32", "device": "cpu", **arguments})


def _adapt(model: FastSentenceTransformer) -> FastSentenceTransformer:
    FastSentenceTransformer.get_peft_model(model, r=4)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def _same(folder: Path, model: SentenceTransformer, **settings: object) -> None:
    again = SentenceTransformer(str(folder), device="cpu", trust_remote_code=model.trust_remote_code)
    expected = model.encode(TEXTS, convert_to_tensor=True, **settings)
    torch.testing.assert_close(again.encode(TEXTS, convert_to_tensor=True, **settings), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", ["full_finetuning", "merge_and_unload"])
def test_a_whole_model_is_loaded_again_before_it_appears(how: str, tmp_path: Path, tiny_dir: TinyDir) -> None:
    model = _load(tiny_dir("bert"), full_finetuning=how == "full_finetuning")
    if how == "merge_and_unload":
        _adapt(model)[0].model.merge_and_unload()
    model.save_pretrained(tmp_path / "good")
    _same(tmp_path / "good", model)
    hook = model[1].register_forward_hook(
        lambda _module, _inputs, out: out.update(sentence_embedding=out["sentence_embedding"].flip(1))
    )
    for name in ("good", "new"):
        with pytest.raises(ExportError, match="is not the one that was trained"):
            model.save_pretrained(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]
    model.save_pretrained(tmp_path / "checkpoint-12")  # a Trainer's: not loaded again
    hook.remove()
    _same(tmp_path / "good", model)


def test_what_cannot_be_loaded_again_never_appears(tmp_path: Path, tiny_dir: TinyDir) -> None:
    model = _load(tiny_dir("bert"))
    model[0].model.config.num_hidden_layers = 3  # one more than the weights have
    model[0].model.config.vocab_size += 7
    with pytest.raises(ExportError, match="cannot load what was saved"):
        model.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_model_saved_over_another_leaves_nothing_of_it(tmp_path: Path, tiny_dir: TinyDir) -> None:
    model = _load(tiny_dir("mpnet"), full_finetuning=True)
    model.append(Dense(HIDDEN, 8))
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "3_Dense").exists()
    (tmp_path / "model" / "mine.txt").touch()
    other = _load(tiny_dir("bert"), full_finetuning=True)
    for save in (other.save_pretrained, other.save_pretrained_merged, other.save_pretrained):
        save(tmp_path / "model")
        _same(tmp_path / "model", other)
        assert not (tmp_path / "model" / "3_Dense").exists()
        assert (tmp_path / "model" / "mine.txt").exists()
    with pytest.raises(ArgumentError, match=r"already holds model\.safetensors"):
        _adapt(_load(tiny_dir("bert"))).save_pretrained(tmp_path / "model")


def test_an_adapter_in_a_modules_own_folder_is_not_overwritten(tmp_path: Path, tiny_dir: TinyDir) -> None:
    """Where releases before 3 put the Transformer, and where a Router puts it."""
    _adapt(_load(tiny_dir("bert"))).save_pretrained(tmp_path)
    (tmp_path / "0_Transformer").mkdir()
    for path in tmp_path.glob("adapter_*"):
        path.rename(tmp_path / "0_Transformer" / path.name)
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ArgumentError, match=r"holds 0_Transformer/adapter_config\.json, 0_Transformer/adapter_model"):
        _load(tiny_dir("bert")).save_pretrained(tmp_path)


@pytest.fixture
def router_dir(tmp_path: Path, tiny_dir: TinyDir) -> Path:
    query, document = (SentenceTransformer(str(tiny_dir(name)), device="cpu") for name in ("bert", "mpnet"))
    router = Router.for_query_document([query[0], query[1]], [document[0], document[1]])
    SentenceTransformer(modules=[router, Normalize()], device="cpu").save_pretrained(str(tmp_path / "router"))
    return tmp_path / "router"


def test_an_adapted_router_is_saved_whole(tmp_path: Path, router_dir: Path) -> None:
    model = _adapt(_load(router_dir))
    for task in ("query", "document"):
        assert not torch.allclose(
            model.encode(TEXTS, task=task, convert_to_tensor=True),
            _load(router_dir).encode(TEXTS, task=task, convert_to_tensor=True),
            atol=1e-3,
        )
        _same(model.save_pretrained_merged(tmp_path / "merged"), model, task=task)
    with pytest.raises(ExportError, match="An adapter inside a Router cannot be loaded again.*save_pretrained_merged"):
        model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "checkpoint-1")
    with pytest.raises(ArgumentError, match=r"holds document_0_Transformer/adapter_config\.json"):
        model.save_pretrained_merged(tmp_path / "checkpoint-1")
    for route in model[0].sub_modules.values():
        route[0].model.merge_and_unload()
    model.save_pretrained(tmp_path / "merged")
    _same(tmp_path / "merged", model, task="query")


def test_training_an_adapted_router_resumes(tmp_path: Path, router_dir: Path) -> None:
    rows = Dataset.from_dict({"anchor": TEXTS[:8], "positive": TEXTS[4:]})

    def train(steps: int, resume: bool) -> dict[str, torch.Tensor]:
        model = _adapt(_load(router_dir))
        arguments = SentenceTransformerTrainingArguments(
            str(tmp_path / "run"),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            save_strategy="steps",
            save_steps=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            router_mapping={"anchor": "query", "positive": "document"},
        )
        loss = MultipleNegativesRankingLoss(model)
        trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=rows, loss=loss)
        trainer.train(resume_from_checkpoint=resume)
        return {name: value.detach().clone() for name, value in model.named_parameters() if "lora" in name}

    train(2, resume=False)
    resumed, through = train(4, resume=True), train(4, resume=False)
    assert all(torch.equal(resumed[name], through[name]) for name in through)


CODE = """
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast


class OwnConfig(BertConfig):
    model_type = "own-bert"


class OwnModel(BertModel):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def remote_dir(tmp_path: Path) -> Path:
    """A checkpoint that brings the code of its model and its tokenizer."""
    folder = tiny_model_dir("bert", tmp_path / "remote", bare=True)
    (folder / "own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    mapped = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own-bert", "auto_map": mapped}))
    path = folder / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "tokenizer_class": "OwnTokenizer"}
    path.write_text(json.dumps({**settings, "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}))
    return folder


@pytest.mark.parametrize("door", ["upper", "lower"])
def test_code_of_the_checkpoint_is_trusted_all_the_way(tmp_path: Path, remote_dir: Path, door: str) -> None:
    if door == "upper":
        model = _adapt(_load(remote_dir, trust_remote_code=True))
    else:
        backbone, tokenizer = FastModel.from_pretrained(
            remote_dir, trust_remote_code=True, dtype="float32", device="cpu"
        )
        model = _adapt(FastModel.as_sentence_transformer(backbone, tokenizer, pooling_mode="mean"))
    assert type(model.tokenizer).__name__ == "OwnTokenizer"
    model.save_pretrained(tmp_path / "adapter")
    again = _load(tmp_path / "adapter", trust_remote_code=True)
    assert type(again.tokenizer).__name__ == "OwnTokenizer"
    torch.testing.assert_close(again.encode(TEXTS), model.encode(TEXTS))
    _, tokenizer = FastModel.from_pretrained(tmp_path / "adapter", trust_remote_code=True, device="cpu")
    assert type(tokenizer).__name__ == "OwnTokenizer"
    _same(model.save_pretrained_merged(tmp_path / "merged"), model)
