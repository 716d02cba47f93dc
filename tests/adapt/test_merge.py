import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from tiny import ARCHITECTURES, TEXTS, tiny_backbone, wordpiece
from torch import nn

from embtune.adapt.merge import iter_merged_tensors, merged_tensors
from embtune.adapt.quantised import dequantised_weight, is_quantised, prepare_quantised_base, quantization_config
from embtune.errors import ModelError

# PEFT asks transformers models for a property under the name that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def _randomise(model: nn.Module) -> None:
    """Give every adapter weight a value: at B = 0 a merge has nothing to add, and proves nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "trainable_tokens" in name or "modules_to_save" in name or parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def _adapted(model_type: str = "bert", **settings: object) -> PeftModel:
    config = LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=4, **{"target_modules": "all-linear", **settings})
    model = get_peft_model(tiny_backbone(model_type), config)
    _randomise(model)
    return model


def _check_equals_peft(model: PeftModel) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    merged = dict(iter_merged_tensors(model))
    assert torch.equal(torch.get_rng_state(), random_state)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    tensors = copy.deepcopy(model).merge_and_unload().state_dict(keep_vars=True)
    # One tensor under two names (T5's embeddings) is written once, under the first.
    names = {id(tensor): name for name, tensor in reversed(tensors.items())}
    expected = {name: tensor.detach() for name, tensor in tensors.items() if names[id(tensor)] == name}
    assert list(merged) == list(expected)
    for name, value in expected.items():
        assert merged[name].dtype == value.dtype, name
        torch.testing.assert_close(
            merged[name], value, atol=1e-6, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    announced = {tensor.name: (tensor.shape, tensor.dtype) for tensor in merged_tensors(model)}
    assert announced == {name: (value.shape, value.dtype) for name, value in merged.items()}


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_equals_peft_merge_on_every_architecture(model_type: str) -> None:
    _check_equals_peft(_adapted(model_type))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "lora_alpha": 3},
        {"use_dora": True},
        {"use_dora": True, "target_modules": ["query", "word_embeddings"]},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"target_modules": ["query"], "modules_to_save": ["pooler", "LayerNorm"]},
        {"target_modules": ["query", "word_embeddings"]},
        {"target_modules": ["value"], "trainable_token_indices": [5, 9]},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_equals_peft_merge_with_every_setting(settings: dict[str, object]) -> None:
    _check_equals_peft(_adapted(**settings))


@pytest.mark.parametrize("dora", [False, True])
def test_several_adapters_merge_the_active_ones(dora: bool) -> None:
    model = _adapted(use_dora=dora)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["query", "value"], use_dora=dora))
    _randomise(model)
    _check_equals_peft(model)
    model.set_adapter("second")
    only_second = dict(iter_merged_tensors(model))
    _check_equals_peft(model)
    model.base_model.set_adapter(["default", "second"])
    both = dict(iter_merged_tensors(model))
    name = "encoder.layer.0.attention.self.query.weight"
    assert not torch.allclose(only_second[name], both[name])
    _check_equals_peft(model)


def test_a_resized_vocabulary_is_merged_whole() -> None:
    backbone = tiny_backbone("bert")
    rows = backbone.get_input_embeddings().num_embeddings
    backbone.resize_token_embeddings(rows + 3, mean_resizing=False)
    model = get_peft_model(backbone, LoraConfig(r=4, target_modules=["query", "word_embeddings"]))
    _randomise(model)
    assert dict(iter_merged_tensors(model))["embeddings.word_embeddings.weight"].shape[0] == rows + 3
    _check_equals_peft(model)


def test_disabled_adapters_give_the_base() -> None:
    model = _adapted(target_modules=["query"], modules_to_save=["pooler"])
    base = tiny_backbone("bert").state_dict()
    with model.disable_adapter():
        merged = dict(iter_merged_tensors(model))
    assert all(torch.equal(merged[name], base[name]) for name in base)
    assert merged.keys() == base.keys()


def test_adapters_merged_in_place_are_not_added_twice() -> None:
    model = _adapted()
    expected = dict(iter_merged_tensors(model))
    model.merge_adapter()
    merged = dict(iter_merged_tensors(model))
    assert all(torch.allclose(merged[name], expected[name], atol=1e-6) for name in expected)


def test_adapters_of_transformers_own_integration() -> None:
    backbone = tiny_backbone("bert")
    backbone.add_adapter(LoraConfig(r=4, target_modules=["query"]))
    _randomise(backbone)
    merged = dict(iter_merged_tensors(backbone))
    plain = tiny_backbone("bert")
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    tokens = wordpiece()(TEXTS[:3], padding=True, return_tensors="pt")
    expected = backbone(**tokens).last_hidden_state
    torch.testing.assert_close(plain(**tokens).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_a_plain_model_gives_its_state_dict_without_a_copy() -> None:
    backbone = tiny_backbone("bert")
    merged = dict(iter_merged_tensors(backbone))
    expected = backbone.state_dict()
    assert list(merged) == list(expected)
    assert all(merged[name].data_ptr() == expected[name].data_ptr() for name in expected)
    assert "embeddings.position_ids" not in merged


def test_shared_weights_come_once() -> None:
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
    names = [name for name, _ in iter_merged_tensors(transformers.T5EncoderModel(config))]
    assert "shared.weight" in names
    assert "encoder.embed_tokens.weight" not in names


def test_the_sum_is_taken_in_float32_and_cast_once() -> None:
    backbone = tiny_backbone("bert").to(torch.bfloat16)
    model = get_peft_model(backbone, LoraConfig(r=4, target_modules=["query"]))
    _randomise(model)
    name = "encoder.layer.1.attention.self.query.weight"
    layer = model.get_base_model().get_submodule(name.removesuffix(".weight"))
    exact = layer.get_base_layer().weight.float() + layer.get_delta_weight("default")
    assert torch.equal(dict(iter_merged_tensors(model, torch.float32))[name], exact)
    assert torch.equal(dict(iter_merged_tensors(model))[name], exact.to(torch.bfloat16))
    assert all(value.dtype == torch.float16 for _, value in iter_merged_tensors(model, torch.float16))


def test_training_goes_on_bit_identically() -> None:
    def steps(model: PeftModel, merge: bool) -> Iterator[torch.Tensor]:
        torch.manual_seed(5)
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        tokens = wordpiece()(TEXTS[:4], padding=True, return_tensors="pt")
        for _ in range(3):
            loss = model(**tokens).last_hidden_state.square().mean()
            loss.backward()
            if merge:
                list(iter_merged_tensors(model))
            optimizer.step()
            optimizer.zero_grad()
            yield loss.detach()

    undisturbed = list(steps(_adapted(lora_dropout=0.1, use_dora=True), merge=False))
    assert list(steps(_adapted(lora_dropout=0.1, use_dora=True), merge=True)) == undisturbed


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_dequantised_before_the_sum(tmp_path: Path, bits: int, dora: bool) -> None:
    tiny_backbone("bert", hidden_size=64).save_pretrained(tmp_path)
    config = quantization_config(bits, torch.device("cpu"), torch.float32)
    backbone = transformers.AutoModel.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    prepare_quantised_base(backbone)
    model = get_peft_model(backbone, LoraConfig(r=4, target_modules=["query", "dense"], use_dora=dora))
    _randomise(model)
    merged = dict(iter_merged_tensors(model))
    assert merged.keys() == tiny_backbone("bert", hidden_size=64).state_dict().keys()
    assert all(value.dtype == torch.float32 for value in merged.values())

    layer = backbone.encoder.layer[0].attention.self
    assert torch.equal(merged["encoder.layer.0.attention.self.key.weight"], dequantised_weight(layer.key))
    weight = dequantised_weight(layer.query.get_base_layer())
    expected = weight + layer.query.get_delta_weight("default")
    if dora:
        # Liu et al. 2024, arXiv:2402.09353, equation 5: magnitude times direction.
        magnitude = layer.query.lora_magnitude_vector["default"].weight
        expected = magnitude.unsqueeze(1) * expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(merged["encoder.layer.0.attention.self.query.weight"], expected)
    assert is_quantised(backbone)


def test_what_cannot_be_merged_is_refused() -> None:
    with pytest.raises(ModelError, match="Prompt-learning"):
        list(
            iter_merged_tensors(
                get_peft_model(
                    tiny_backbone("bert"),
                    PromptTuningConfig(task_type=TaskType.FEATURE_EXTRACTION, num_virtual_tokens=2),
                )
            )
        )
    ia3 = IA3Config(target_modules=["key"], feedforward_modules=[])
    with pytest.raises(ModelError, match="Adapters of the kind"):
        list(iter_merged_tensors(get_peft_model(tiny_backbone("bert"), ia3)))
    with pytest.raises(ModelError, match="no transformers model"):
        list(iter_merged_tensors(nn.Linear(2, 2)))
