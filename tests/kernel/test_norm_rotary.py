import pytest
import torch
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

pytest.importorskip("triton")

from embtune.errors import ArgumentError
from embtune.kernels.norm_rotary import norm_rotate, plain_norm_rotate

EPS = 1e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(tokens: int, heads: int, groups: int, head_dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens * heads)
    shapes = ((tokens, heads, head_dim), (tokens, groups, head_dim), (head_dim,), (head_dim,))
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def angles(rows: int, head_dim: int) -> tuple[Tensor, Tensor]:
    half = torch.arange(rows, device=DEVICE)[:, None] * torch.linspace(1, 0.01, head_dim // 2, device=DEVICE)
    both = torch.cat((half, half), dim=-1)
    return both.cos(), both.sin()


def gradients(outs: tuple[Tensor, ...], parts: list[Tensor]) -> tuple[Tensor, ...]:
    weights = [torch.linspace(-1, 1, out.numel(), device=DEVICE).mul(40).sin().view(out.shape) for out in outs]
    return torch.autograd.grad(outs, parts, [each.to(out.dtype) for each, out in zip(weights, outs, strict=True)])


@pytest.mark.usefixtures("nan_scratch")
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "groups", "head_dim"),
    [(1, 1, 1, 4), (65, 6, 2, 24), (33, 3, 1, 256), (129, 14, 2, 8), (7, 16, 8, 128)],
)
def test_outputs_and_gradients_are_the_twins(
    tokens: int, heads: int, groups: int, head_dim: int, unit_offset: bool
) -> None:
    parts, tables = inputs(tokens, heads, groups, head_dim), angles(tokens, head_dim)
    found, expected = (each(*parts, EPS, *tables, unit_offset) for each in (norm_rotate, plain_norm_rotate))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6)
    for one, other in zip(gradients(found, parts), gradients(expected, parts), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=5e-5)


def test_frozen_scales_cost_no_gradient() -> None:
    parts, tables = inputs(9, 4, 2, 16), angles(9, 16)
    everything = gradients(norm_rotate(*parts, EPS, *tables), parts)
    q, k, *scales = parts
    outs = norm_rotate(q, k, *(scale.detach() for scale in scales), EPS, *tables)
    for one, other in zip(gradients(outs, [q, k]), everything, strict=False):
        torch.testing.assert_close(one, other)


def test_slices_transposed_gradients_and_repeated_angles() -> None:
    joined = torch.randn(10, 3, 4, 16, device=DEVICE).requires_grad_()
    scales, tables = inputs(9, 4, 2, 16)[2:], angles(5, 16)
    weights = torch.randn(16, 10, 4, device=DEVICE).permute(1, 2, 0)
    q, k = joined[:, 0], joined[:, 2]
    found, expected = (each(q, k, *scales, EPS, *tables) for each in (norm_rotate, plain_norm_rotate))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6)
    grad, expected_grad = (torch.autograd.grad(each, joined, (weights, weights)) for each in (found, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=5e-5)


def test_half_precision_is_nearer_to_the_truth_than_transformers() -> None:
    # float16, because the interpreter truncates what it stores as bfloat16.
    parts, (cos, sin) = inputs(33, 4, 2, 16, torch.float16), angles(33, 16)
    norms = [Qwen3RMSNorm(16, eps=EPS) for _ in range(2)]
    for norm, weight in zip(norms, parts[2:], strict=True):
        norm.weight = torch.nn.Parameter(weight.detach())
    normed = [norm(part[None]).transpose(1, 2) for norm, part in zip(norms, parts, strict=False)]
    theirs = [each.transpose(1, 2)[0] for each in apply_rotary_pos_emb(*normed, cos[None].half(), sin[None].half())]
    found = norm_rotate(*parts, EPS, cos, sin)
    truth = plain_norm_rotate(*(part.double() for part in parts), EPS, cos.double(), sin.double())
    for one, other, right in zip(found, theirs, truth, strict=True):
        assert one.dtype == other.dtype == torch.float16
        assert (one - right).norm() < 0.7 * (other - right).norm()


def test_what_does_not_fit_is_named() -> None:
    q, k, *scales = inputs(6, 4, 2, 16)
    with pytest.raises(ArgumentError, match=r"k_weight \(15,\) must be \[16\]"):
        norm_rotate(q, k, scales[0], scales[1][:15], EPS, *angles(6, 16))
    with pytest.raises(ArgumentError, match="whose rows divide the 6 tokens"):
        norm_rotate(q, k, *scales, EPS, *angles(4, 16))
    with pytest.raises(ArgumentError, match="not torch.float64"):
        norm_rotate(q, k, scales[0].double(), scales[1], EPS, *angles(6, 16))
