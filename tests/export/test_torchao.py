"""Folders with int8 linear layers: what they lose, that they load again, and that nothing else happens."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tiny import TEXTS, randomise_adapter
from torchao.quantization import Int4WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import TorchAoConfig

from embtune.errors import ArgumentError, ExportError, MissingPackageError
from embtune.export.merged import save_merged
from embtune.export.torchao import MINIMUM_COSINE, save_torchao
from embtune.files import read_json

SCHEMES = sorted(MINIMUM_COSINE)


def adapted(folder: Path) -> SentenceTransformer:
    """A model with an adapter that changes its embeddings."""
    model = SentenceTransformer(str(folder), device="cpu")
    config = LoraConfig(r=4, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION")
    model[0].model = get_peft_model(model[0].model, config)
    randomise_adapter(model, std=0.06)
    return model


def embed(model: SentenceTransformer) -> torch.Tensor:
    return model.encode(TEXTS[:6], show_progress_bar=False, convert_to_tensor=True)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("scheme", SCHEMES)
def test_real_model_with_adapter_stays_close_and_unchanged(minilm_dir: Path, tmp_path: Path, scheme: str) -> None:
    model = adapted(minilm_dir).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    folder = save_torchao(model, tmp_path / "int8", scheme=scheme)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]

    tensors = load_file(folder / "model.safetensors")
    quantised = [
        name for name, tensor in tensors.items() if name.endswith("weight_qdata") and tensor.dtype == torch.int8
    ]
    assert len(quantised) == 37
    assert not any("lora_" in name or "base_model" in name for name in tensors)
    card = (folder / "README.md").read_text()
    assert f"`{scheme}`" in card
    found = re.search(r"(0\.9\d+) on average, (0\.9\d+) at worst", card)
    assert MINIMUM_COSINE[scheme] <= float(found[2]) < float(found[1]) < 0.99995

    saved = embed(SentenceTransformer(str(folder), device="cpu"))
    assert torch.cosine_similarity(saved, embed(model)).min() > MINIMUM_COSINE[scheme]
    untrained = SentenceTransformer(str(minilm_dir), device="cpu")
    assert torch.cosine_similarity(saved, embed(untrained)).min() < 0.98


@pytest.mark.parametrize("scheme", SCHEMES)
def test_reloads_exactly_as_it_was_quantised(tiny_dir: Callable[..., Path], tmp_path: Path, scheme: str) -> None:
    model = SentenceTransformer(str(tiny_dir("bert")), device="cpu")
    kind = Int8WeightOnlyConfig if scheme == "int8_weight_only" else Int8DynamicActivationInt8WeightConfig
    quantised = SentenceTransformer(
        str(save_merged(model, tmp_path / "merged")),
        device="cpu",
        model_kwargs={"quantization_config": TorchAoConfig(kind())},
    )
    folder = save_torchao(model, tmp_path / "int8", scheme=scheme, verify=False)
    reloaded = SentenceTransformer(str(folder), device="cpu")
    assert torch.equal(embed(reloaded), embed(quantised))
    assert not torch.equal(embed(reloaded), embed(model))


@pytest.mark.parametrize("model_type", ["mpnet", "modernbert", "qwen3"])
def test_other_architectures_keep_the_layout_of_all_readers(
    tiny_dir: Callable[..., Path], tmp_path: Path, model_type: str
) -> None:
    model = SentenceTransformer(str(tiny_dir(model_type)), device="cpu")
    model.prompts = {"query": "find: "}
    folder = save_torchao(model, tmp_path / "int8")
    assert read_json(folder / "modules.json")[0]["type"] == "sentence_transformers.models.Transformer"
    assert read_json(folder / "config.json")["quantization_config"]["quant_method"] == "torchao"
    reloaded = SentenceTransformer(str(folder), device="cpu")
    assert reloaded.prompts["query"] == "find: "
    assert reloaded.max_seq_length == model.max_seq_length
    cosines = (reloaded.encode_query(["a text"]) * model.encode_query(["a text"])).sum()
    assert cosines > MINIMUM_COSINE["int8_weight_only"]


def test_bfloat16_stays_bfloat16(minilm_dir: Path, tmp_path: Path) -> None:
    model = SentenceTransformer(str(minilm_dir), device="cpu", model_kwargs={"dtype": torch.bfloat16})
    folder = save_torchao(model, tmp_path / "int8", scheme="int8_dynamic", verify=False)
    assert read_json(folder / "config.json")["dtype"] == "bfloat16"
    assert (folder / "model.safetensors").stat().st_size < 36_000_000


def test_too_much_loss_is_an_error_and_leaves_nothing(
    tiny_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MINIMUM_COSINE, "int8_dynamic", 0.9999999)
    model = SentenceTransformer(str(tiny_dir("bert")), device="cpu")
    message = (
        r"int8_dynamic loses too much .* below 0\.9999999 .*Use scheme='int8_weight_only' or save_pretrained_merged"
    )
    with pytest.raises(ExportError, match=message):
        save_torchao(model, tmp_path / "int8", scheme="int8_dynamic")
    assert list(tmp_path.iterdir()) == []
    save_torchao(model, tmp_path / "int8", scheme="int8_dynamic", verify=False)
    assert "on average" not in (tmp_path / "int8" / "README.md").read_text()


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("int4_weight_only", "int4 weights need kernels"),
        ("float8_dynamic", "float8 needs a GPU"),
        ("int8", "is not offered. Use"),
        (None, "is not offered. Use"),
        (Int4WeightOnlyConfig(), "int4 weights need kernels"),
    ],
)
def test_other_schemes_are_refused_with_the_reason(
    tiny_dir: Callable[..., Path], tmp_path: Path, scheme: str, reason: str
) -> None:
    model = SentenceTransformer(str(tiny_dir("bert")), device="cpu")
    with pytest.raises(ArgumentError, match=reason) as caught:
        save_torchao(model, tmp_path / "int8", scheme=scheme)
    assert "'int8_weight_only' or 'int8_dynamic'" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_matrices_stored_in_one_are_refused(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = SentenceTransformer(str(tiny_dir("nomic_bert")), device="cpu")
    with pytest.raises(ExportError, match=r"NomicBertModel is stored with several matrices in one"):
        save_torchao(model, tmp_path / "int8")
    assert list(tmp_path.iterdir()) == []


def test_adapter_folder_is_not_written_into(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    model = SentenceTransformer(str(tiny_dir("bert")), device="cpu")
    with pytest.raises(ArgumentError, match=r"already holds adapter_config\.json"):
        save_torchao(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_missing_torchao_names_the_command(
    tiny_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embtune.runtime.is_installed", lambda module: module != "torchao")
    model = SentenceTransformer(str(tiny_dir("bert")), device="cpu")
    with pytest.raises(MissingPackageError, match=r'pip install "embtune\[torchao\]"'):
        save_torchao(model, tmp_path / "int8")
