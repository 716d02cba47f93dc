"""Rotary embeddings and float32 residual streams by kernels that Triton compiled, in real widths and half precision."""

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import ARCHITECTURES, TEXTS, tiny_backbone
from torch import Tensor

from embtune.adapt.fused import fuse_lora
from embtune.kernels.add_norm import NormKind, add_norm, plain_add_norm
from embtune.kernels.norm_rotary import norm_rotate, plain_norm_rotate
from embtune.kernels.rotary import plain_rotate, plain_rotate_joined, rotate, rotate_joined
from embtune.models.families import FAMILIES
from embtune.models.fused import fuse_elementwise

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Heads of ModernBERT-base, Qwen3-0.6B, EmbeddingGemma, Qwen2.5-0.5B.
HEADS = [(12, 12, 64), (16, 8, 128), (3, 1, 256), (14, 2, 64)]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype).requires_grad_()


def angles(tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    frequencies = 1e4 ** -torch.linspace(0, 1, head_dim // 2, device="cuda")
    turns = torch.arange(tokens, device="cuda")[:, None] % 1024 * frequencies
    both = torch.cat((turns, turns), dim=-1)
    return both.cos(), both.sin()


def gradients(outs: tuple[Tensor, ...], parts: list[Tensor]) -> tuple[Tensor, ...]:
    # Eighths are the same number in every dtype: what would be rounded here does not cancel in a sum over rows.
    counts = [torch.arange(out.numel(), device="cuda") for out in outs]
    weights = [count.mul(7919).remainder(10007).remainder(17).sub(8) / 8 for count in counts]
    return torch.autograd.grad(
        outs, parts, [each.view(out.shape).to(out.dtype) for each, out in zip(weights, outs, strict=True)]
    )


def wide(parts: list[Tensor]) -> list[Tensor]:
    return [part.detach().double().requires_grad_() for part in parts]


def assert_near(found: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, right, strict=True):
        # In half precision the result is rounded once, and what was kept for the backward pass once more.
        tolerance = 2e-5 if one.dtype == torch.float32 else 3 * torch.finfo(one.dtype).eps
        assert (one - other).norm() <= tolerance * other.norm() + 1e-12
        assert (one - other).abs().max() <= 4 * tolerance * other.abs().max() + 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups", "head_dim"), HEADS)
@pytest.mark.parametrize("tokens", [1, 4099])
def test_rotary_embeddings_are_the_twins(
    tokens: int, heads: int, groups: int, head_dim: int, dtype: torch.dtype
) -> None:
    parts, tables = [draw(tokens, count, head_dim, dtype=dtype) for count in (heads, groups)], angles(tokens, head_dim)
    truth, right = wide(parts), tuple(table.double() for table in tables)
    found, expected = rotate(*parts, *tables), plain_rotate(*truth, *right)
    assert_near(found, expected)
    assert_near(gradients(found, parts), gradients(expected, truth))

    parts += [draw(head_dim, dtype=dtype) for _ in range(2)]
    truth = wide(parts)
    for unit_offset in (False, True):
        found = norm_rotate(*parts, 1e-6, *tables, unit_offset)
        expected = plain_norm_rotate(*truth, 1e-6, *right, unit_offset)
        assert_near(found, expected)
        assert_near(gradients(found, parts), gradients(expected, truth))

    joined = [draw(tokens, 3, heads, head_dim, dtype=dtype)]
    truth = wide(joined)
    found, expected = rotate_joined(*joined, *tables), plain_rotate_joined(*truth, *right)
    assert_near(found, expected)
    assert_near(gradients(found, joined), gradients(expected, truth))


@pytest.mark.parametrize("stream", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "unit_offset"), [("layer", False), ("rms", False), ("rms", True)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 768), (4097, 1024), (6000, 128), (17, 8192)])
def test_add_norm_is_the_twin(
    rows: int, columns: int, kind: NormKind, unit_offset: bool, dtype: torch.dtype, stream: torch.dtype
) -> None:
    shapes = ((rows, columns), (rows, columns), (columns,), (columns,))
    parts = [draw(*shape, dtype=dtype) for shape in shapes]
    parts[0] = draw(rows, columns, dtype=stream)
    truth = wide(parts)
    found, expected = (
        function(*each, 1e-5, kind, unit_offset) for function, each in ((add_norm, parts), (plain_add_norm, truth))
    )
    assert [each.dtype for each in found] == [torch.float32, dtype]
    assert_near(found, expected)
    for one, other in zip(gradients(found, parts), gradients(expected, truth), strict=True):
        # What is kept of the normalised sum has the weight's dtype, whatever dtype the gradient has.
        tolerance = 2e-5 if {dtype, one.dtype} == {torch.float32} else 3 * torch.finfo(torch.bfloat16).eps
        assert (one - other).norm() <= tolerance * other.norm() + 1e-12


def adapted(model_type: str, seed: int) -> PeftModel:
    """A deep random model of real head widths whose weights bfloat16 holds exactly."""
    model = tiny_backbone(
        model_type,
        seed=seed,
        num_hidden_layers=8,
        hidden_size=256,
        intermediate_size=512,
        **({"head_dim": 64} if model_type == "qwen3" else {}),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "emb" not in name:
                parameter.mul_(0.2)
    model = get_peft_model(model.bfloat16().float(), LoraConfig(r=8, target_modules=FAMILIES[model_type].lora_targets))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.eval().to("cuda")


def embeddings_and_gradients(model: PeftModel, model_type: str, autocast: bool = False) -> tuple[Tensor, Tensor]:
    batch = ARCHITECTURES[model_type][0]()(TEXTS, padding=True, return_tensors="pt").to("cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        states = model(**batch).last_hidden_state
    real = batch["attention_mask"][..., None]
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    embeddings = torch.nn.functional.normalize((states * real).sum(1) / real.sum(1), dim=-1)
    scores = embeddings[::2] @ embeddings[1::2].T * 20
    loss = torch.nn.functional.cross_entropy(scores, torch.arange(len(scores), device="cuda"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return embeddings.detach(), torch.cat([each.flatten() for each in torch.autograd.grad(loss, trained)])


@pytest.mark.parametrize("model_type", ["modernbert", "qwen3"])
def test_a_bfloat16_base_is_as_near_to_float64_as_autocast(model_type: str) -> None:
    """Over several models: of one alone, either may come nearer by chance."""
    ratios: list[list[float]] = []
    for seed in range(4):
        right = embeddings_and_gradients(adapted(model_type, seed).double(), model_type)
        stock = embeddings_and_gradients(adapted(model_type, seed), model_type, autocast=True)
        model = adapted(model_type, seed)
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
        fuse_lora(model)
        fuse_elementwise(model)
        ours = embeddings_and_gradients(model, model_type)
        ratios.append(
            [
                float((found - truth).norm() / (other - truth).norm())
                for found, other, truth in zip(ours, stock, right, strict=True)
            ]
        )
    for errors in zip(*ratios, strict=True):
        assert math.exp(sum(map(math.log, errors)) / len(errors)) <= 1.1
