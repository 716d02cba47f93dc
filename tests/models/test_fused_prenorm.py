"""Rotary embeddings in one kernel, and the float32 residual stream of pre-norm layers; with Triton's interpreter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_fused import DEVICE, backbone, features, gradients, kernels_in, states
from tiny import ARCHITECTURES, TEXTS
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer

from embtune.accelerate.compiling import compile_layers
from embtune.adapt.fused import fuse_lora
from embtune.api import FastSentenceTransformer
from embtune.models.checkpointing import enable_gradient_checkpointing
from embtune.models.fused import fuse_elementwise, unfuse_elementwise

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("interpreter")

# The kernels that a step of each architecture runs, beside those of its feed-forward layers.
KERNELS = {
    "modernbert": {"_AddNormBackward", "_RotateJoinedBackward"},
    "qwen3": {"_AddNormBackward", "_NormRotateBackward"},
    "gemma3_text": {"_AddNormBackward", "_NormRotateBackward"},
    "llama": {"_AddNormBackward", "_RotateBackward"},
    "qwen2": {"_AddNormBackward", "_RotateBackward"},
    "mistral": {"_AddNormBackward", "_RotateBackward"},
    "eurobert": {"_AddNormBackward", "_RotateBackward"},
    "nomic_bert": {"_RotateBackward"},
    "jina_embeddings_v3": {"_RotateBackward"},
    "gte": {"_RotateBackward"},
}
PRE_NORM = [name for name, kernels in KERNELS.items() if "_AddNormBackward" in kernels]


def embed(model: nn.Module, model_type: str, **settings: Any) -> Tensor:
    batch = features(model_type)
    out = model(**batch, **settings).last_hidden_state[batch["attention_mask"].bool()]
    return out if out.dtype == torch.float64 else out.float()


def relative(found: Tensor, right: Tensor) -> float:
    found, right = found.detach().double(), right.detach().double()
    return float((found - right).norm() / right.norm())


def flat(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten().double() for gradient in found.values()])


@pytest.mark.parametrize("model_type", [name for name in KERNELS if name in ARCHITECTURES])
def test_every_layer_runs_the_kernels(model_type: str) -> None:
    model = backbone(model_type)
    fuse_elementwise(model)
    assert kernels_in(states(model, features(model_type))) >= KERNELS[model_type]


@pytest.mark.parametrize("model_type", PRE_NORM)
def test_a_half_precision_base_has_a_float32_stream(model_type: str) -> None:
    model = backbone(model_type).half()
    batch = features(model_type)
    expected = model(**batch, output_hidden_states=True).hidden_states
    fuse_elementwise(model)
    out = model(**batch, output_hidden_states=True)
    assert out.last_hidden_state.dtype == torch.float32
    assert [each.dtype for each in out.hidden_states[1:]] == [torch.float32] * 2
    mask = batch["attention_mask"].bool()
    for found, right in zip(out.hidden_states, expected, strict=True):
        assert relative(found[mask], right[mask]) < 0.01
    unfuse_elementwise(model)
    for found, right in zip(model(**batch, output_hidden_states=True).hidden_states, expected, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=0)


@pytest.mark.parametrize("model_type", ["modernbert", "qwen3", "gemma3_text"])
def test_a_half_precision_base_is_as_near_to_the_truth_as_autocast(model_type: str) -> None:
    # float16, because the interpreter truncates what it stores as bfloat16.
    def calm() -> PreTrainedModel:
        model = backbone(model_type, num_hidden_layers=5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.7 if parameter.ndim == 2 else 1)
        return model.half().float()

    def run(model: PreTrainedModel, autocast: bool = False) -> tuple[Tensor, Tensor]:
        with torch.autocast(DEVICE.type, torch.float16, enabled=autocast):
            out = embed(model, model_type)
        return out.detach(), flat(gradients(model, out))

    truth = run(calm().double())
    fused = calm().half()
    fuse_elementwise(fused)
    ours, half, autocast = (
        [relative(found, right) for found, right in zip(run(*each), truth, strict=True)]
        for each in ((fused,), (calm().half(),), (calm(), True))
    )
    for error, without, theirs in zip(ours, half, autocast, strict=True):
        assert error < 0.9 * without
        assert error < 1.1 * theirs


@pytest.mark.parametrize("model_type", ["modernbert", "qwen3", "gemma3_text", "nomic_bert"])
def test_autocast_decides_alone(model_type: str) -> None:
    truth = embed(backbone(model_type), model_type)
    for dtype in (torch.float32, torch.float16):
        results = []
        for fused in (False, True):
            model = backbone(model_type).to(dtype)
            assert not fused or fuse_elementwise(model)
            with torch.autocast(DEVICE.type, torch.float16):
                results.append(states(model, features(model_type)))
        original, found = results
        assert found.dtype == original.dtype
        assert relative(found, truth) < 1.25 * relative(original, truth)


@pytest.mark.parametrize("model_type", ["modernbert", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradient_checkpointing_computes_the_same(model_type: str, dtype: torch.dtype) -> None:
    model = backbone(model_type).to(dtype)
    fuse_elementwise(model)
    model.train()
    torch.manual_seed(0)
    expected = embed(model, model_type)
    expected_gradients = gradients(model, expected)
    enable_gradient_checkpointing(model)
    runs: list[int] = []
    model.get_submodule("layers.0.mlp").register_forward_pre_hook(lambda *_: runs.append(1))
    torch.manual_seed(0)
    found = embed(model, model_type)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    found_gradients = gradients(model, found)
    assert len(runs) == 2
    for name, gradient in found_gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("model_type", "targets"),
    [("modernbert", ["Wqkv", "Wo", "Wi"]), ("qwen3", ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"])],
)
def test_adapters_are_called_and_fused_ones_share_their_input(model_type: str, targets: list[str]) -> None:
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(backbone(model_type), config)
    expected = embed(model, model_type)
    expected_gradients = gradients(model, expected)
    fuse_elementwise(model)
    for fuse in (lambda _: None, fuse_lora):
        fuse(model)
        found = embed(model, model_type)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
        for name, gradient in gradients(model, found).items():
            error = (gradient - expected_gradients[name]).norm()
            assert error <= 1e-4 * expected_gradients[name].norm() + 1e-5, name
    with model.disable_adapter():
        assert (embed(model, model_type) - expected).abs().max() > 0.01


class OwnLayer(Qwen3DecoderLayer):
    """Somebody else's layer, which knows nothing of a float32 stream."""


class OwnAttention(Qwen3Attention):
    """Somebody else's attention, which knows nothing of float32 angles."""


@pytest.mark.parametrize(
    ("place", "own", "untouched"),
    [("layers.1", OwnLayer, "layers.0"), ("layers.1.self_attn", OwnAttention, "rotary_emb")],
)
def test_what_others_made_keeps_the_dtypes_it_knows(place: str, own: type[nn.Module], untouched: str) -> None:
    model = backbone("qwen3").half()
    expected = embed(model, "qwen3")
    model.get_submodule(place).__class__ = own
    changed = fuse_elementwise(model)
    assert not {untouched, place} & set(changed)
    assert relative(embed(model, "qwen3"), expected) < 0.01


@pytest.mark.parametrize("place", ["layers.1.post_attention_layernorm", "layers.0.input_layernorm", "norm"])
def test_hooks_on_a_norm_still_fire(place: str) -> None:
    model = backbone("qwen3").half()
    expected = embed(model, "qwen3")
    fuse_elementwise(model)
    seen: list[torch.dtype] = []
    model.get_submodule(place).register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    assert relative(embed(model, "qwen3"), expected) < 0.01
    assert seen == [torch.float32 if place == "norm" else torch.float16]


@pytest.mark.parametrize("place", ["embeddings.norm", "final_norm", "layers.1.attn_norm"])
def test_a_replaced_norm_of_modernbert_leaves_or_takes_the_stream(place: str) -> None:
    model = backbone("modernbert").half()
    expected = embed(model, "modernbert")
    parent, _, name = place.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Sequential(model.get_submodule(place)))
    fuse_elementwise(model)
    assert relative(embed(model, "modernbert"), expected) < 0.01


@pytest.mark.parametrize("model_type", ["modernbert", "qwen3", "nomic_bert"])
def test_attention_without_an_interface_is_the_originals(model_type: str) -> None:
    model = backbone(model_type, attn_implementation="eager").half()
    model.set_attn_implementation("eager")
    expected = embed(model, model_type)
    fuse_elementwise(model)
    found = embed(model, model_type)
    assert not kernels_in(found) & {"_RotateBackward", "_RotateJoinedBackward", "_NormRotateBackward"}
    assert relative(found, expected) < 0.01
    batch = features(model_type)
    assert model(**batch, output_attentions=True).attentions[0].dtype == torch.float16


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text"])
def test_a_head_norm_of_somebody_else_is_called(model_type: str) -> None:
    model = backbone(model_type)
    expected = embed(model, model_type)
    attention: Any = model.get_submodule("layers.0.self_attn")
    attention.q_norm = nn.Sequential(attention.q_norm)
    fuse_elementwise(model)
    found = embed(model, model_type)
    assert kernels_in(found) >= {"_RotateBackward", "_NormRotateBackward"}
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_cache_of_keys_and_values_is_filled() -> None:
    model, batch = backbone("qwen3"), features("qwen3")
    with torch.no_grad():
        expected = model(**batch, use_cache=True).past_key_values
        fuse_elementwise(model)
        found = model(**batch, use_cache=True).past_key_values
    for layer, other in zip(found.layers, expected.layers, strict=True):
        torch.testing.assert_close((layer.keys, layer.values), (other.keys, other.values), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("model_type", ["modernbert", "qwen3"])
def test_compiled_layers_hold_no_kernel_and_take_the_wide_stream(model_type: str) -> None:
    model = backbone(model_type).half()
    expected = embed(model, model_type)
    fuse_elementwise(model)
    torch._dynamo.reset()
    compile_layers(model, backend="eager")
    found = embed(model, model_type)
    torch._dynamo.reset()
    assert kernels_in(found) <= {"_AddNormBackward", "_RMSNormBackward"}  # of the norms at the ends
    assert relative(found, expected) < 0.01


@pytest.mark.parametrize("model_type", ["modernbert", "qwen3", "gemma3_text"])
def test_packed_rows_are_the_same(model_type: str, tiny_dir: Callable[..., Path]) -> None:
    model = FastSentenceTransformer.from_pretrained(
        str(tiny_dir(model_type)), engine="packed", dtype="float32"
    ).requires_grad_()
    batch = {name: value for name, value in model.preprocess(TEXTS[:4]).items() if isinstance(value, Tensor)}
    expected = model({**batch})["sentence_embedding"]
    fuse_elementwise(model[0].model)
    found = model({**batch})["sentence_embedding"]
    assert kernels_in(found) >= KERNELS[model_type]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
