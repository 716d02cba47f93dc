import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import ARCHITECTURES, TEXTS, tiny_backbone
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.bert.modeling_bert import BertOutput, BertSelfOutput

from embtune.models.checkpointing import enable_gradient_checkpointing
from embtune.models.fused import fuse_elementwise, unfuse_elementwise
from embtune.models.swaps import swap_attention, undo_swaps
from embtune.runtime import is_installed, runs_triton

pytestmark = pytest.mark.usefixtures("interpreter")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Modules changed in a model of two layers.
CHANGED = {
    "bert": 4,
    "roberta": 4,
    "xlm-roberta": 4,
    "camembert": 4,
    "electra": 4,
    "ernie": 4,
    "mpnet": 4,
    "distilbert": 2,
    "modernbert": 9,
    "nomic_bert": 5,
    "gte": 3,
    "jina_embeddings_v3": 3,
    "eurobert": 12,
    "qwen2": 12,
    "qwen3": 16,
    "llama": 12,
    "mistral": 12,
    "gemma3_text": 20,
}
KERNELS = (
    "_DropoutAddLayerNormBackward",
    "_RMSNormBackward",
    "_AddNormBackward",
    "_GatedBackward",
    "_GatedHalvesBackward",
    "_RotateBackward",
    "_RotateJoinedBackward",
    "_NormRotateBackward",
)
needs_kernels = pytest.mark.skipif(not is_installed("triton"), reason="needs triton")


def backbone(model_type: str, device: torch.device = DEVICE, **overrides: Any) -> PreTrainedModel:
    model = tiny_backbone(model_type, **overrides).to(device)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms begin as ones and zeros, which would hide a wrong one.
            if "norm" in name.lower() and parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(device))
    return model


def features(model_type: str, device: torch.device = DEVICE) -> dict[str, Tensor]:
    tokenizer = ARCHITECTURES[model_type][0]()
    return dict(tokenizer([TEXTS[0], TEXTS[3]], padding=True, return_tensors="pt").to(device))


def states(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).last_hidden_state[batch["attention_mask"].bool()]


def gradients(model: nn.Module, out: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (out * torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).sin()).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def kernels_in(out: Tensor) -> set[str]:
    """The kernels of embtune in the graph behind a tensor."""
    seen, todo = set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(following for following, _ in node.next_functions)
    return {node.name() for node in seen} & set(KERNELS)


@needs_kernels
@pytest.mark.parametrize("model_type", [name for name in CHANGED if name in ARCHITECTURES])
def test_fused_models_compute_the_same_and_can_be_undone(model_type: str) -> None:
    model, batch = backbone(model_type), features(model_type)
    classes = [type(module) for module in model.modules()]
    names = list(model.state_dict())
    expected = states(model, batch)
    expected_gradients = gradients(model, expected)

    changed = fuse_elementwise(model)
    assert len(changed) == len(set(changed)) == CHANGED[model_type]
    assert fuse_elementwise(model) == []
    assert list(model.state_dict()) == names
    found = states(model, batch)
    assert kernels_in(found)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    found_gradients = gradients(model, found)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in found_gradients.items():
        error = (gradient - expected_gradients[name]).norm()
        # A key's bias has no influence: its gradient is nothing but rounding.
        assert error <= 1e-4 * expected_gradients[name].norm() + 1e-5, name

    unfuse_elementwise(model)
    assert [type(module) for module in model.modules()] == classes
    assert not kernels_in(states(model, batch))


@pytest.mark.parametrize("model_type", ["bert", "mpnet", "distilbert", "modernbert", "qwen3", "gemma3_text"])
def test_without_kernels_a_fused_model_takes_the_original_way(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = torch.device("cpu")
    assert not runs_triton(cpu)
    model, batch = backbone(model_type, cpu), features(model_type, cpu)
    expected = states(model, batch)
    fuse_elementwise(model)
    torch.testing.assert_close(states(model, batch), expected, rtol=0, atol=0)


@needs_kernels
def test_float64_takes_the_original_way() -> None:
    model, batch = backbone("bert").double(), features("bert")
    expected = states(model, batch)
    fuse_elementwise(model)
    torch.testing.assert_close(states(model, batch), expected, rtol=0, atol=0)


@needs_kernels
@pytest.mark.parametrize("model_type", ["bert", "distilbert", "qwen3", "modernbert"])
def test_copies_and_pickles_stay_fused(model_type: str) -> None:
    model, batch = backbone(model_type), features(model_type)
    fuse_elementwise(model)
    expected = states(model, batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        out = states(other, batch)
        assert kernels_in(out) == kernels_in(expected)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        unfuse_elementwise(other)
        assert not kernels_in(states(other, batch))


@needs_kernels
def test_adapters_on_the_linear_layers_are_called() -> None:
    config = LoraConfig(r=4, target_modules=["query", "dense"], init_lora_weights=False)
    model, batch = get_peft_model(backbone("bert"), config), features("bert")
    expected = states(model, batch)
    expected_gradients = gradients(model, expected)
    assert len(fuse_elementwise(model)) == CHANGED["bert"]
    found = states(model, batch)
    assert kernels_in(found) == {"_DropoutAddLayerNormBackward"}
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for name, gradient in gradients(model, found).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert (states(model, batch) - found).abs().max() > 0.01


@needs_kernels
def test_dropout_is_drawn_from_torchs_random_numbers_and_only_in_training() -> None:
    model, batch = backbone("bert", attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.3), features("bert")
    fuse_elementwise(model)

    def run(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(seed)
        out = states(model, batch)
        return out, gradients(model, out)

    torch.testing.assert_close(run(0)[0], run(1)[0], rtol=0, atol=0)
    model.train()
    (first, first_gradients), (again, _), (other, _) = run(0), run(0), run(1)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert (first - other).abs().max() > 0.1
    enable_gradient_checkpointing(model)
    recomputed, recomputed_gradients = run(0)
    torch.testing.assert_close(recomputed, first, rtol=0, atol=0)
    for name, gradient in recomputed_gradients.items():
        torch.testing.assert_close(gradient, first_gradients[name], rtol=1e-5, atol=1e-6)


@needs_kernels
def test_hooks_inside_still_fire() -> None:
    model, batch = backbone("bert"), features("bert")
    fuse_elementwise(model)
    seen = []
    output = model.get_submodule("encoder.layer.0.output")
    handle = output.LayerNorm.register_forward_hook(lambda *_: seen.append("norm"))
    states(model, batch)
    assert seen == ["norm"]
    handle.remove()
    output.dropout.forward = lambda hidden: hidden * 0
    silenced = states(model, batch)
    assert (silenced - states(backbone("bert"), batch)).abs().max() > 0.1


@needs_kernels
def test_modules_that_are_not_the_originals_are_left_alone() -> None:
    class OwnOutput(BertOutput):
        pass

    model = backbone("bert")
    model.get_submodule("encoder.layer.0.output").__class__ = OwnOutput
    replaced = model.get_submodule("encoder.layer.1.output")
    replaced.forward = replaced.forward
    names = fuse_elementwise(model)
    assert names == ["encoder.layer.0.attention.output", "encoder.layer.1.attention.output"]
    batch = features("bert")
    norm = model.get_submodule("encoder.layer.0.attention.output").LayerNorm
    wrapped = nn.Sequential(norm)
    model.get_submodule("encoder.layer.0.attention.output").LayerNorm = wrapped
    torch.testing.assert_close(states(model, batch), states(backbone("bert"), batch), rtol=0, atol=1e-5)


@needs_kernels
def test_an_activation_without_a_kernel_takes_the_original_way() -> None:
    model, batch = backbone("modernbert", hidden_activation="relu"), features("modernbert")
    expected = states(model, batch)
    fuse_elementwise(model)
    found = states(model, batch)
    assert kernels_in(found) == {"_AddNormBackward", "_RotateJoinedBackward"}
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@needs_kernels
def test_compiled_code_holds_no_kernel_of_ours() -> None:
    module = backbone("bert").get_submodule("encoder.layer.0.attention.output")
    expected = module(torch.ones(2, 32, device=DEVICE), torch.ones(2, 32, device=DEVICE))
    assert type(module) is BertSelfOutput
    fuse_elementwise(module)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    out = compiled(torch.ones(2, 32, device=DEVICE), torch.ones(2, 32, device=DEVICE))
    assert not kernels_in(out)
    torch.testing.assert_close(out, expected)


@needs_kernels
def test_swapped_attention_and_fused_modules_live_together() -> None:
    model, batch = backbone("mpnet"), features("mpnet")
    expected = states(model, batch)
    swap_attention(model)
    assert len(fuse_elementwise(model)) == CHANGED["mpnet"]
    found = states(model, batch)
    assert kernels_in(found)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    undo_swaps(model)
    unfuse_elementwise(model)
    torch.testing.assert_close(states(model, batch), expected, rtol=0, atol=0)
