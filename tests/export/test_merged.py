import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Router
from tiny import ARCHITECTURES, HIDDEN, TEXTS, tiny_backbone
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig

from embtune.adapt.quantised import prepare_quantised_base
from embtune.errors import ArgumentError, ExportError, ModelError
from embtune.export import merged
from embtune.export.merged import save_compatible, save_merged, write_backbone

pytestmark = [
    # PEFT asks transformers models for a property under the name that transformers 5.23 has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]


def _adapt(model: SentenceTransformer, **settings: object) -> SentenceTransformer:
    torch.manual_seed(2)
    for transformer in {id(module): module for module in model.modules() if hasattr(module, "processor")}.values():
        if hasattr(transformer, "model") and not isinstance(transformer, SentenceTransformer):
            config = LoraConfig(
                task_type=TaskType.FEATURE_EXTRACTION, r=4, **{"target_modules": "all-linear", **settings}
            )
            transformer.model = get_peft_model(transformer.model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def _load(folder: Path, **kwargs: object) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu", **kwargs)


def _embeddings(model: SentenceTransformer, **kwargs: object) -> np.ndarray:
    return model.encode(TEXTS, show_progress_bar=False, **kwargs)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_architecture_loads_in_plain_sentence_transformers(
    tiny_dir: Callable[..., Path], tmp_path: Path, model_type: str
) -> None:
    model = _adapt(_load(tiny_dir(model_type)))
    folder = save_merged(model, tmp_path / "merged")
    np.testing.assert_allclose(_embeddings(_load(folder)), _embeddings(model.eval()), atol=1e-5)
    # The names and shapes that transformers' own save writes, the original layout of NomicBERT included.
    tensors = load_file(folder / "model.safetensors")
    original = load_file(tiny_dir(model_type) / "model.safetensors")
    assert {name: value.shape for name, value in tensors.items()} == {n: v.shape for n, v in original.items()}
    assert not any(torch.isnan(value).any() for value in tensors.values())
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [type(tiny_backbone(model_type)).__name__]
    assert config["dtype"] == "float32"
    assert list(tmp_path.iterdir()) == [folder]
    assert isinstance(model[0].model, PeftModel)


def test_real_weights_prompts_similarity_and_card(minilm_dir: Path, tmp_path: Path) -> None:
    model = _adapt(_load(minilm_dir), target_modules=["query", "value"])
    model.prompts = {"query": "query: ", "document": "passage: "}
    model.similarity_fn_name = "dot"
    model.append(Dense(384, 64, activation_function=nn.Identity()))
    model.model_card_data.tags.append("generated_from_trainer")
    save_merged(model, tmp_path / "deep" / "merged", verify=False)
    folder = save_merged(model, tmp_path / "deep" / "merged")  # the folder of an earlier save is replaced
    reloaded = _load(folder)
    assert (reloaded.prompts, reloaded.similarity_fn_name) == (model.prompts, "dot")
    assert (reloaded.max_seq_length, type(reloaded[3])) == (256, Dense)
    assert (folder / "vocab.txt").read_bytes() == (minilm_dir / "vocab.txt").read_bytes()
    model.eval()
    np.testing.assert_allclose(
        _embeddings(reloaded, prompt_name="query"), _embeddings(model, prompt_name="query"), atol=1e-5
    )
    card = (folder / "README.md").read_text()
    assert "'architecture': 'BertModel'" in card
    assert "Peft" not in card
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert (8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")) % 8 == 0


def test_tokens_added_before_lora_survive(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = _load(tiny_dir("qwen3"))
    model.tokenizer.add_special_tokens({"extra_special_tokens": ["<|extra|>"]})
    model[0].model.resize_token_embeddings(len(model.tokenizer), mean_resizing=False)
    _adapt(model)
    reloaded = _load(save_merged(model, tmp_path / "merged"))
    texts = ["<|extra|> before", "and <|extra|> within"]
    assert reloaded.preprocess(texts)["input_ids"].tolist() == model.preprocess(texts)["input_ids"].tolist()
    np.testing.assert_allclose(reloaded.encode(texts), model.eval().encode(texts), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16])
def test_the_dtype_asked_for_is_written(
    tiny_dir: Callable[..., Path], tmp_path: Path, dtype: str | torch.dtype
) -> None:
    folder = save_merged(_adapt(_load(tiny_dir("bert"))), tmp_path / "merged", dtype=dtype)
    expected = str(dtype).removeprefix("torch.")
    assert {str(t.dtype) for t in load_file(folder / "model.safetensors").values()} == {f"torch.{expected}"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == expected
    assert str(AutoModel.from_pretrained(folder).dtype) == f"torch.{expected}"
    with pytest.raises(ArgumentError, match="dtype='int3' is not known"):
        save_merged(_load(tiny_dir("bert")), tmp_path / "other", dtype="int3")


def test_the_checkpoints_dtype_is_the_default(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = _adapt(_load(tiny_dir("bert"), model_kwargs={"dtype": torch.bfloat16}))
    folder = save_merged(model, tmp_path / "own")
    assert load_file(folder / "model.safetensors")["pooler.dense.weight"].dtype == torch.bfloat16
    model[0].model.get_base_model().checkpoint_dtype = torch.float32
    folder = save_merged(model, tmp_path / "checkpoint")
    assert load_file(folder / "model.safetensors")["pooler.dense.weight"].dtype == torch.float32
    assert next(model[0].model.get_base_model().parameters()).dtype == torch.bfloat16


def test_a_quantised_base_becomes_a_dense_model(tmp_path: Path) -> None:
    from tiny import tiny_model_dir

    base = tiny_model_dir("distilbert", tmp_path / "base", dim=64, bare=True)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    kwargs = {"quantization_config": config, "dtype": torch.bfloat16, "device_map": {"": "cpu"}}
    model = SentenceTransformer(str(base), model_kwargs=kwargs)
    prepare_quantised_base(model[0].model)
    _adapt(model)
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    folder = save_merged(model, tmp_path / "merged")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    written = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in written
    assert written["dtype"] == "float32"
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.float32}


def test_training_goes_on_bit_identically(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    def losses(save: bool) -> list[float]:
        model = _adapt(_load(tiny_dir("bert"), model_kwargs={"dtype": torch.bfloat16}), lora_dropout=0.1)
        model.train()
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        found = []
        for _ in range(3):
            loss = model(model.preprocess(TEXTS[:4]))["sentence_embedding"][0, :9].float().sum()
            loss.backward()
            if save:
                save_merged(model, tmp_path / "merged")
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        assert "save" not in vars(model[0])
        return found

    assert losses(save=True) == losses(save=False)


def test_every_backbone_of_a_router_is_merged(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    query, document = (_load(tiny_dir(name)) for name in ("bert", "mpnet"))
    router = Router.for_query_document(query_modules=[query[0], query[1]], document_modules=[document[0], document[1]])
    model = _adapt(SentenceTransformer(modules=[router, Normalize()], device="cpu"), target_modules=["dense"])
    folder = save_merged(model, tmp_path / "merged")
    reloaded = _load(folder)
    for task in ("query", "document"):
        np.testing.assert_allclose(_embeddings(reloaded, task=task), _embeddings(model.eval(), task=task), atol=1e-5)
    assert not list(folder.rglob("adapter*"))


def test_large_models_are_sharded(
    tiny_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged, "_SHARD_BYTES", 40_000)
    model = _adapt(_load(tiny_dir("nomic_bert")))
    folder = save_merged(model, tmp_path / "merged")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in folder.glob("*.safetensors")}
    assert len(set(index["weight_map"].values())) > 1
    stored = sum(t.nbytes for path in folder.glob("*.safetensors") for t in load_file(path).values())
    assert index["metadata"]["total_size"] == stored
    np.testing.assert_allclose(_embeddings(_load(folder)), _embeddings(model.eval()), atol=1e-5)
    # A single file, other shards and shards again replace one another; no shard of an earlier save stays.
    for size in (10**9, 20_000, 40_000):
        monkeypatch.setattr(merged, "_SHARD_BYTES", size)
        save_merged(model, folder)
        index = folder / "model.safetensors.index.json"
        weights = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        assert {path.name for path in folder.glob("*.safetensors")} == weights
        assert (len(weights) > 1) == (size < 10**9)


def test_a_failed_comparison_leaves_nothing_behind(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = _adapt(_load(tiny_dir("bert")))
    handle = model[1].register_forward_hook(
        lambda _module, _inputs, out: out.update(sentence_embedding=out["sentence_embedding"].flip(1))
    )
    with pytest.raises(ExportError, match="not the one that was trained"):
        save_merged(model, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
    save_merged(model, tmp_path / "merged", verify=False)
    handle.remove()


def test_contradictory_folders_are_refused_and_left_alone(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = _adapt(_load(tiny_dir("bert")))
    adapter = save_compatible(model, tmp_path / "adapter")
    files = {path: path.stat().st_mtime_ns for path in adapter.rglob("*")}
    with pytest.raises(ArgumentError, match=r"adapter_config.json, adapter_model.safetensors, which would contradict"):
        save_merged(model, adapter)
    assert {path: path.stat().st_mtime_ns for path in adapter.rglob("*")} == files
    whole = save_merged(model, tmp_path / "whole")
    with pytest.raises(ArgumentError, match=r"model\.safetensors"):
        save_compatible(model, whole)
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match="is a file"):
        save_merged(model, tmp_path / "file")


def test_an_adapter_folder_holds_no_weights_of_the_base(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = _adapt(_load(tiny_dir("bert")))
    folder = save_compatible(model, tmp_path / "adapter")
    assert not (folder / "model.safetensors").exists()
    assert not (folder / "config.json").exists()
    assert "sentence_transformers.models.Pooling" in (folder / "modules.json").read_text()
    plain = _load(tiny_dir("bert"))
    adapted = _load(tiny_dir("bert"))
    adapted[0].model = PeftModel.from_pretrained(adapted[0].model, folder)
    np.testing.assert_allclose(_embeddings(adapted), _embeddings(model.eval()), atol=1e-6)
    np.testing.assert_allclose(
        _embeddings(_load(save_compatible(plain, tmp_path / "plain"))), _embeddings(plain), atol=1e-6
    )


def test_a_process_without_embtune_loads_the_folder_in_silence(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = _adapt(_load(tiny_dir("modernbert")))
    folder = save_merged(model, tmp_path / "merged")
    code = (
        "import sys, warnings, numpy, transformers\n"
        "transformers.logging.disable_progress_bar()\n"
        "from sentence_transformers import SentenceTransformer\n"
        "warnings.simplefilter('error')\n"
        "print('loading', file=sys.stderr)\n"
        f"model = SentenceTransformer({str(folder)!r}, device='cpu')\n"
        "assert 'embtune' not in sys.modules\n"
        f"numpy.save({str(tmp_path / 'embeddings.npy')!r}, model.encode({TEXTS!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.rpartition("loading\n")[2] == ""
    np.testing.assert_allclose(np.load(tmp_path / "embeddings.npy"), _embeddings(model.eval()), atol=1e-5)


def test_only_transformers_models_are_written(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Linear is no transformers model"):
        write_backbone(nn.Linear(HIDDEN, HIDDEN), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_names_of_wrappers_never_reach_a_file(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    backbone.add_module("lora_head", nn.Linear(2, 2))
    write_backbone(backbone, tmp_path)
    backbone.embeddings.add_module("base_layer", nn.Linear(2, 2))
    with pytest.raises(
        AssertionError, match=r"embeddings.base_layer.weight would be saved under the name of a wrapper"
    ):
        write_backbone(backbone, tmp_path)


def test_a_compiled_backbone_is_written_under_clean_names(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    write_backbone(torch.compile(backbone), tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == backbone.state_dict().keys()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertModel"]
