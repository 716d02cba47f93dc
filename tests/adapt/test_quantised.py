"""Quantised bases on real parts: bitsandbytes, torchao, transformers and PEFT, on small random models and MiniLM."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import TEXTS, tiny_model_dir
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from embtune import runtime
from embtune.adapt.quantised import (
    Int8Linear,
    dequantised_weight,
    describe_quantisation,
    is_quantised,
    prepare_quantised_base,
    quantization_config,
)
from embtune.errors import ArgumentError, MissingPackageError, ModelError
from embtune.models.checkpointing import enable_gradient_checkpointing
from embtune.models.families import encoder_layers

pytestmark = [
    # bitsandbytes and torchao use torch.jit when they are imported; PEFT asks transformers by an old name.
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

CPU = torch.device("cpu")
OURS = ("nf4", "int8")
BACKENDS = (*OURS, "llm_int8")
SHORT = ["read a file", "open(path).read()", "sort a list", "sorted(items)", "list a folder", "os.listdir(path)"]
FAMILIES = ("bert", "roberta", "mpnet", "distilbert", "modernbert", "qwen3")


def config_of(backend: str, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Any:
    if backend == "llm_int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[".*pooler"])
    return quantization_config({"nf4": 4, "int8": 8}[backend], device, dtype)


def load(
    folder: Path, backend: str | None, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> PreTrainedModel:
    if backend is None:
        return AutoModel.from_pretrained(folder, dtype=dtype).to(device).requires_grad_(False)
    config = config_of(backend, dtype, device)
    backbone = AutoModel.from_pretrained(folder, dtype=dtype, quantization_config=config, device_map={"": device})
    prepare_quantised_base(backbone)
    return backbone


def dense_twin(folder: Path, quantised: PreTrainedModel) -> PreTrainedModel:
    """An unquantised model that multiplies by the very values that the quantised one stands for."""
    twin = load(folder, None, device=quantised.device)
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.data = dequantised_weight(quantised.get_submodule(name))
    return twin


def with_lora(backbone: PreTrainedModel, **settings: Any) -> PeftModel:
    """Adapters whose B is random: at B = 0 the gradient of A would be zero and prove nothing."""
    inside = {id(module) for layer in encoder_layers(backbone) for module in layer.modules()}
    linear = [n for n, module in backbone.named_modules() if isinstance(module, nn.Linear) and id(module) in inside]
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=linear, **settings)
    adapted = get_peft_model(backbone, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted


def batch_of(folder: Path, texts: list[str]) -> dict[str, torch.Tensor]:
    return AutoTokenizer.from_pretrained(folder)(
        texts, padding=True, truncation=True, max_length=48, return_tensors="pt"
    )


def embed(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    batch = {name: tensor.to(next(model.parameters()).device) for name, tensor in batch.items()}
    states = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"].unsqueeze(-1)
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adapter gradients of one training step; the seed makes two models drop the same activations."""
    model.train()
    model.zero_grad()
    torch.manual_seed(2)
    embeddings = embed(model, batch)
    F.cross_entropy(
        20 * embeddings[::2] @ embeddings[1::2].T, torch.arange(len(embeddings) // 2, device=embeddings.device)
    ).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    assert all(expected[name].norm() > 0 for name in expected)
    return max(((found[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected)


@pytest.mark.parametrize("backend", OURS)
def test_encoder_layers_are_quantised_and_the_rest_is_not(tiny_dir: Callable[..., Path], backend: str) -> None:
    for model_type in ("bert", "electra", "albert", "qwen3"):
        overrides = {"embedding_size": 16} if model_type == "electra" else {}
        folder = tiny_dir(model_type, bare=True)
        if overrides:
            folder = tiny_model_dir(model_type, folder.parent / "projected", bare=True, **overrides)
        backbone = load(folder, backend)
        inside = {id(m) for layer in encoder_layers(backbone) for m in layer.modules() if isinstance(m, nn.Linear)}
        quantised = {id(m) for m in backbone.modules() if isinstance(m, nn.Linear) and is_quantised(m)}
        assert inside == quantised
        dense = load(folder, None)
        kept = [
            n for n, m in dense.named_modules() if hasattr(m, "weight") and not is_quantised(backbone.get_submodule(n))
        ]
        assert any("norm" in name.lower() for name in kept)
        for name in kept:
            assert torch.equal(backbone.get_submodule(name).weight, dense.get_submodule(name).weight)


def test_config_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match=r"bits=3.*load_in_4bit"):
        quantization_config(3, CPU, torch.float32)
    with pytest.raises(ArgumentError, match=r"load_in_4bit.*not on meta"):
        quantization_config(4, torch.device("meta"), torch.float32)
    monkeypatch.setattr(runtime, "is_installed", lambda _: False)
    with pytest.raises(MissingPackageError, match=r"load_in_4bit needs.*embtune\[qlora\]"):
        quantization_config(4, CPU, torch.float32)
    with pytest.raises(MissingPackageError, match=r"load_in_8bit needs.*embtune\[torchao\]"):
        quantization_config(8, CPU, torch.float32)


def test_nf4_uses_double_quantisation_and_the_asked_dtype(tiny_dir: Callable[..., Path]) -> None:
    layer = encoder_layers(load(tiny_dir("bert"), "nf4", torch.bfloat16))[0].attention.self.query
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.quant_state.nested
    assert layer.compute_dtype == torch.bfloat16


def test_int8_leaves_the_settings_of_the_compiler_alone(
    tiny_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._inductor.config, "coordinate_descent_tuning", False)
    load(tiny_dir("bert"), "int8")
    assert not torch._inductor.config.coordinate_descent_tuning


def test_what_a_model_says_of_itself(tiny_dir: Callable[..., Path]) -> None:
    dense = load(tiny_dir("bert"), None)
    assert not is_quantised(dense)
    assert describe_quantisation(dense) == "not quantised"
    nf4 = with_lora(load(tiny_dir("bert"), "nf4"))
    assert is_quantised(nf4)
    assert describe_quantisation(nf4) == (
        "NF4 (4 bits) with double quantisation, computing in float32 (bitsandbytes), 12 linear layers"
    )
    int8 = with_lora(load(tiny_dir("bert"), "int8"))
    assert is_quantised(int8)
    assert describe_quantisation(int8) == "int8 weights, one scale a row (torchao), 12 linear layers"


@pytest.mark.parametrize(("backend", "most"), [(None, 0.0), ("nf4", 0.12), ("int8", 0.01), ("llm_int8", 0.01)])
def test_dequantised_weight_is_what_the_layer_multiplies_by(
    tiny_dir: Callable[..., Path], backend: str | None, most: float
) -> None:
    folder = tiny_dir("bert")
    original = encoder_layers(load(folder, None))[1].output.dense
    layer = encoder_layers(load(folder, backend))[1].output.dense.train()
    inputs = torch.randn(3, 5, layer.in_features)
    for _ in range(2):  # bitsandbytes moves the scales of LLM.int8 in the first forward
        weight = dequantised_weight(layer)
        assert weight.dtype == torch.float32
        assert weight.shape == (layer.out_features, layer.in_features)
        assert (weight - original.weight).norm() <= most * original.weight.norm()
        torch.testing.assert_close(layer(inputs), F.linear(inputs, weight, layer.bias), atol=1e-5, rtol=1e-5)


def test_a_bfloat16_base_is_dequantised_without_rounding(tiny_dir: Callable[..., Path]) -> None:
    """The scales are float32 whatever dtype was quantised; a merge must not lose what they say."""
    for backend in OURS:
        weight = dequantised_weight(encoder_layers(load(tiny_dir("bert"), backend, torch.bfloat16))[0].output.dense)
        assert weight.dtype == torch.float32
        assert not torch.equal(weight, weight.bfloat16().float())


def test_dequantised_weight_refuses_what_it_does_not_know() -> None:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ModelError, match="float8_e4m3fn cannot be made dense"):
        dequantised_weight(layer)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradients_equal_those_of_the_dense_twin(tiny_dir: Callable[..., Path], model_type: str, backend: str) -> None:
    folder = tiny_dir(model_type)
    batch = batch_of(folder, TEXTS[:6])
    quantised = load(folder, backend)
    expected = gradients(with_lora(dense_twin(folder, quantised)), batch)
    adapted = with_lora(quantised)
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert relative_error(gradients(adapted, batch), expected) < 1e-5


@pytest.mark.parametrize("backend", OURS)
def test_biases_can_be_trained(tiny_dir: Callable[..., Path], backend: str) -> None:
    folder = tiny_dir("bert")
    batch = batch_of(folder, TEXTS[:4])
    quantised = load(folder, backend)
    expected = gradients(with_lora(dense_twin(folder, quantised), bias="lora_only"), batch)
    found = gradients(with_lora(quantised, bias="lora_only"), batch)
    assert any(name.endswith("base_layer.bias") for name in found)
    # Attention ignores a constant added to every key, so the gradient there is rounding noise.
    for kept in (found, expected):
        for name in [name for name in kept if name.endswith("key.base_layer.bias")]:
            assert kept.pop(name).norm() < 1e-5
    assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("model_type", ["bert", "qwen3"])
def test_an_evaluation_changes_nothing_of_training(tmp_path: Path, model_type: str, backend: str) -> None:
    # Wide enough for bitsandbytes to repack, which fails on rows of less than 64.
    wide = {"hidden_size": 64, "intermediate_size": 128} | ({"head_dim": 16} if model_type == "qwen3" else {})
    folder = tiny_model_dir(model_type, tmp_path / "wide", bare=True, **wide)
    batch = batch_of(folder, TEXTS[:6])
    undisturbed = gradients(with_lora(load(folder, backend)), batch)
    adapted = with_lora(load(folder, backend))
    with torch.no_grad():
        before = embed(adapted.eval(), batch)
    found = gradients(adapted, batch)
    with torch.no_grad():
        after = embed(adapted.eval(), batch)
    assert torch.equal(before, after)
    assert all(torch.equal(found[name], undisturbed[name]) for name in undisturbed)


def test_a_weight_repacked_for_inference_is_refused(tmp_path: Path) -> None:
    folder = tiny_model_dir("bert", tmp_path / "wide", bare=True, hidden_size=64)
    backbone = AutoModel.from_pretrained(folder, quantization_config=config_of("nf4"), device_map={"": CPU})
    if not encoder_layers(backbone)[0].output.dense.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes repacks only on a CPU with AVX512-BF16")
    with torch.no_grad():
        embed(backbone.eval(), batch_of(folder, TEXTS[:2]))
    with pytest.raises(ModelError, match=r"layer\.0\.attention\.self\.query.*Load the model again"):
        prepare_quantised_base(backbone)
    with pytest.raises(ModelError, match="repacked"):
        dequantised_weight(encoder_layers(backbone)[0].output.dense)


@pytest.mark.parametrize("backend", OURS)
def test_no_dense_weight_waits_for_the_backward_pass(tiny_dir: Callable[..., Path], backend: str) -> None:
    folder = tiny_dir("bert")
    adapted = with_lora(load(folder, backend)).train()
    shapes = {
        (m.out_features, m.in_features) for m in adapted.modules() if isinstance(m, nn.Linear) and is_quantised(m)
    }
    stored = {
        parameter.untyped_storage().data_ptr() for parameter in adapted.parameters() if type(parameter) is nn.Parameter
    }
    kept: list[tuple[int, ...]] = []

    def record(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in stored:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        embed(adapted, batch_of(folder, TEXTS[:5]))
    assert len(kept) > 20
    assert shapes.isdisjoint(kept)
    assert {shape[::-1] for shape in shapes}.isdisjoint(kept)


@pytest.mark.parametrize("backend", OURS)
def test_a_prepared_base_survives_copies_pickle_and_casts(tiny_dir: Callable[..., Path], backend: str) -> None:
    folder = tiny_dir("bert")
    batch = batch_of(folder, TEXTS[:6])
    backbone = load(folder, backend).eval()
    reference = embed(backbone, batch)
    assert torch.equal(embed(copy.deepcopy(backbone), batch), reference)
    file = io.BytesIO()
    torch.save(backbone, file)
    file.seek(0)
    assert torch.equal(embed(torch.load(file, weights_only=False), batch), reference)
    # transformers refuses some casts of a quantised model, but a module around it can still cast it.
    wrapped = nn.Sequential(copy.deepcopy(backbone)).bfloat16()
    assert F.cosine_similarity(embed(wrapped[0], batch), reference).min() > 0.99
    assert is_quantised(wrapped)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("backend", OURS)
def test_gradient_checkpointing_gives_the_same_gradients(tiny_dir: Callable[..., Path], backend: str) -> None:
    folder = tiny_dir("bert")
    batch = batch_of(folder, TEXTS[:6])
    adapted = with_lora(load(folder, backend))
    expected = gradients(adapted, batch)
    enable_gradient_checkpointing(adapted, True)
    assert relative_error(gradients(adapted, batch), expected) < 1e-5


@pytest.mark.parametrize("backend", OURS)
def test_in_bfloat16_activations_and_weights_stay_bfloat16(tiny_dir: Callable[..., Path], backend: str) -> None:
    folder = tiny_dir("bert")
    batch = batch_of(folder, TEXTS[:6])
    backbone = load(folder, backend, torch.bfloat16)
    assert {p.dtype for p in backbone.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert backbone(**batch).last_hidden_state.dtype == torch.bfloat16
    twin = dense_twin(folder, backbone)
    with torch.no_grad():
        assert F.cosine_similarity(embed(backbone.eval(), batch), embed(twin.eval(), batch)).min() > 0.999
    error = relative_error(gradients(with_lora(backbone), batch), gradients(with_lora(twin), batch))
    assert error < 0.2


def test_under_autocast_int8_gradients_stay_close(tiny_dir: Callable[..., Path]) -> None:
    folder = tiny_dir("bert")
    batch = batch_of(folder, TEXTS[:6])
    adapted = with_lora(load(folder, "int8"))
    expected = gradients(adapted, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(adapted, batch)
    assert 1e-4 < relative_error(found, expected) < 0.2


def train_save_reload(folder: Path, backend: str, adapter: Path) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """Losses of 20 steps, the embeddings after them, and those of the saved adapter on a base quantised anew."""
    batch = batch_of(folder, SHORT)
    adapted = with_lora(load(folder, backend)).eval()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(20):
        embeddings = embed(adapted, batch)
        loss = F.cross_entropy(20 * embeddings[::2] @ embeddings[1::2].T, torch.arange(3))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    adapted.save_pretrained(str(adapter))
    reloaded = PeftModel.from_pretrained(load(folder, backend), str(adapter)).eval()
    with torch.no_grad():
        return losses, embed(adapted, batch), embed(reloaded, batch)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_training_lowers_the_loss_and_the_adapter_reloads(
    tiny_dir: Callable[..., Path], tmp_path: Path, model_type: str, backend: str
) -> None:
    losses, trained, reloaded = train_save_reload(tiny_dir(model_type), backend, tmp_path / "adapter")
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(trained, reloaded)


@pytest.mark.parametrize(("backend", "least"), [("nf4", 0.9), ("int8", 0.997)])
def test_minilm_in_four_and_eight_bits(minilm_dir: Path, tmp_path: Path, backend: str, least: float) -> None:
    batch = batch_of(minilm_dir, SHORT)
    with torch.no_grad():
        start = embed(load(minilm_dir, backend).eval(), batch)
        assert F.cosine_similarity(start, embed(load(minilm_dir, None).eval(), batch)).min() > least
    losses, trained, reloaded = train_save_reload(minilm_dir, backend, tmp_path / "adapter")
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(trained, reloaded)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", OURS)
def test_on_cuda_gradients_equal_those_of_the_dense_twin(minilm_dir: Path, backend: str) -> None:
    batch = batch_of(minilm_dir, TEXTS[:8])
    quantised = load(minilm_dir, backend, device=torch.device("cuda"))
    expected = gradients(with_lora(dense_twin(minilm_dir, quantised)), batch)
    adapted = with_lora(quantised)
    with torch.no_grad():
        embed(adapted.eval(), batch)
    assert relative_error(gradients(adapted, batch), expected) < 1e-3


def test_int8_layers_are_the_only_class_that_is_swapped(tiny_dir: Callable[..., Path]) -> None:
    int8 = {type(m) for m in load(tiny_dir("bert"), "int8").modules() if isinstance(m, nn.Linear) and is_quantised(m)}
    assert int8 == {Int8Linear}
    assert not any(isinstance(m, Int8Linear) for m in load(tiny_dir("bert"), None).modules())
