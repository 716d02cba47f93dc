"""Norms, residuals, dropout and gates as kernels that Triton compiled, in real widths and half precision."""

import pytest
import torch
from tiny import ARCHITECTURES, TEXTS, tiny_backbone
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertConfig, BertSelfOutput
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from embtune.kernels.gated import ACTIVATIONS, gated, gated_halves, plain_gated, plain_gated_halves
from embtune.kernels.layer_norm import dropout_add_layer_norm, plain_dropout_add_layer_norm
from embtune.kernels.rms_norm import plain_rms_norm, rms_norm
from embtune.models.fused import fuse_elementwise

pytestmark = pytest.mark.gpu

SIZES = [(1, 768), (5000, 768), (4097, 384), (300, 1024), (17, 8192), (6000, 128)]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype).requires_grad_()


def gradients(out: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    # Eighths are the same number in every dtype: what would be rounded here does not cancel in a sum over rows.
    weights = torch.arange(out.numel(), device="cuda").mul(7919).remainder(10007).remainder(17).sub(8) / 8
    return torch.autograd.grad(out, parts, weights.to(out.dtype).view(out.shape))


def wide(*parts: Tensor) -> list[Tensor]:
    return [part.detach().double().requires_grad_() for part in parts]


def assert_near(found: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    # In half precision the result is rounded once, and what was kept for the backward pass once more.
    tolerance = 2e-5 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
    assert found.dtype == dtype
    assert (found - right).norm() <= tolerance * right.norm() + 1e-12
    assert (found - right).abs().max() <= 4 * tolerance * right.abs().max() + 1e-12


def kept(rows: int, columns: int, p: float, seed: Tensor) -> Tensor:
    """What a seed leaves, seen from a float32 gradient: in half precision a kept element's may round to zero."""
    hidden, residual, weight = draw(rows, columns), draw(rows, columns), draw(columns)
    out = dropout_add_layer_norm(hidden, residual, weight, None, 1e-5, p, seed)
    return gradients(out, hidden)[0] != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_layer_norm_is_the_twin(rows: int, columns: int, p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    parts = [draw(*shape, dtype=dtype) for shape in ((rows, columns), (rows, columns), (columns,), (columns,))]
    seed, keep = torch.tensor([5], device="cuda"), None
    if p:
        keep = kept(rows, columns, p, seed)
        assert abs(keep.double().mean() - (1 - p)) < 5 * (p * (1 - p) / keep.numel()) ** 0.5
    out = dropout_add_layer_norm(*parts, 1e-5, p, seed)
    found = gradients(out, *parts)
    truth = wide(*parts)
    expected = plain_dropout_add_layer_norm(*truth, 1e-5, p, keep)
    for each, right in zip((out, *found), (expected, *gradients(expected, *truth)), strict=True):
        assert_near(each, right, dtype)


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_rms_norm_is_the_twin(rows: int, columns: int, dtype: torch.dtype, unit_offset: bool) -> None:
    torch.manual_seed(rows)
    parts = [draw(rows, columns, dtype=dtype), draw(columns, dtype=dtype)]
    out = rms_norm(*parts, 1e-6, unit_offset)
    truth = wide(*parts)
    expected = plain_rms_norm(*truth, 1e-6, unit_offset)
    for each, right in zip((out, *gradients(out, *parts)), (expected, *gradients(expected, *truth)), strict=True):
        assert_near(each, right, dtype)


def test_rms_norm_rounds_as_transformers_does() -> None:
    x = draw(6000, 1024, dtype=torch.bfloat16)
    theirs = Qwen3RMSNorm(1024)
    theirs.weight = nn.Parameter(draw(1024, dtype=torch.bfloat16).detach())
    # A sum in another order may tip the rounding of single elements.
    assert (rms_norm(x, theirs.weight, theirs.variance_epsilon) != theirs(x)).float().mean() < 0.001


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 3072), (3001, 1152), (500, 100)])
def test_gates_are_the_twins(rows: int, columns: int, dtype: torch.dtype, activation: str) -> None:
    torch.manual_seed(rows)
    gate, up, both = (draw(rows, width, dtype=dtype) for width in (columns, columns, 2 * columns))
    truth = wide(gate, up, both)
    out, expected = gated(gate, up, activation), plain_gated(*truth[:2], activation)
    for each, right in zip((out, *gradients(out, gate, up)), (expected, *gradients(expected, *truth[:2])), strict=True):
        assert_near(each, right, dtype)
    out, expected = gated_halves(both, activation), plain_gated_halves(truth[2], activation)
    assert_near(out, expected, dtype)
    assert_near(gradients(out, both)[0], gradients(expected, truth[2])[0], dtype)


def embed(model_type: str, dtype: torch.dtype, fused: bool, autocast: bool = False) -> tuple[Tensor, Tensor]:
    model = tiny_backbone(model_type).to("cuda", dtype)
    assert not fused or fuse_elementwise(model)
    batch = ARCHITECTURES[model_type][0]()(TEXTS, padding=True, return_tensors="pt").to("cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        states = model(**batch).last_hidden_state[batch["attention_mask"].bool()]
    (states.float() * torch.linspace(-1, 1, states.shape[-1], device="cuda")).square().sum().backward()
    parts = [parameter.grad.float().flatten() for parameter in model.parameters() if parameter.grad is not None]
    return states.detach(), torch.cat(parts)


@pytest.mark.parametrize("model_type", ["bert", "mpnet", "distilbert", "modernbert", "qwen3", "gemma3_text"])
def test_fused_models_are_as_near_to_float32_as_the_originals(model_type: str) -> None:
    truth, true_gradient = embed(model_type, torch.float32, fused=False)
    states, gradient = embed(model_type, torch.float32, fused=True)
    torch.testing.assert_close(states, truth, rtol=0, atol=1e-4)
    assert (gradient - true_gradient).norm() <= 1e-4 * true_gradient.norm()
    for dtype, autocast in ((torch.bfloat16, False), (torch.float16, False), (torch.float32, True)):
        errors = []
        for fused in (True, False):
            states, gradient = embed(model_type, dtype, fused, autocast)
            errors.append(((states - truth).norm(), (gradient - true_gradient).norm(), states.dtype))
        (fused_error, fused_gradient_error, fused_dtype), (error, gradient_error, original_dtype) = errors
        # The residual stream of a pre-norm model in half precision becomes float32.
        assert fused_dtype in (original_dtype, torch.float32)
        assert fused_error <= 1.25 * error
        assert fused_gradient_error <= 1.25 * gradient_error


def self_output() -> BertSelfOutput:
    module = BertSelfOutput(BertConfig(hidden_size=256, hidden_dropout_prob=0.25)).to("cuda", torch.bfloat16).train()
    fuse_elementwise(module)
    return module


def test_replays_of_a_graph_drop_anew_and_the_same_forward_and_backward() -> None:
    module = self_output()
    # Of ones, what is dropped falls below the mean.
    module.dense = nn.Identity()
    hidden = torch.ones(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    residual = torch.zeros_like(hidden)
    weights = torch.linspace(-1e3, 1e3, hidden.numel(), device="cuda").sin().view(hidden.shape).bfloat16()

    def step() -> tuple[Tensor, Tensor]:
        out = module(hidden, residual)
        return out, torch.autograd.grad(out, hidden, weights)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, hidden_grad = step()
    masks = []
    for _ in range(3):
        graph.replay()
        masks.append(out > 0)
        assert torch.equal(masks[-1], hidden_grad != 0)
        assert masks[-1].double().mean().item() == pytest.approx(0.75, abs=0.02)
    # Two masks differ where one keeps and the other does not.
    for first, second in ((0, 1), (1, 2), (0, 2)):
        assert (masks[first] != masks[second]).double().mean().item() == pytest.approx(2 * 0.75 * 0.25, abs=0.03)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_a_training_step_never_waits_for_the_device() -> None:
    module, states = self_output(), torch.ones(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    module(states, states).sum().backward()
    try:
        torch.cuda.set_sync_debug_mode("error")
        module(states, states).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
