import pytest
import torch
from torch import Tensor
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

pytest.importorskip("triton")

from embtune.errors import ArgumentError
from embtune.kernels.rotary import plain_rotate, plain_rotate_joined, rotate, rotate_joined

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def angles(rows: int, head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    half = torch.arange(rows, device=DEVICE)[:, None] * torch.linspace(1, 0.01, head_dim // 2, device=DEVICE)
    both = torch.cat((half, half), dim=-1)
    return both.cos().to(dtype), both.sin().to(dtype)


def gradients(outs: tuple[Tensor, ...], *parts: Tensor) -> tuple[Tensor, ...]:
    weights = [torch.linspace(-1, 1, out.numel(), device=DEVICE).sin().view(out.shape).to(out.dtype) for out in outs]
    return torch.autograd.grad(outs, parts, weights)


@pytest.mark.usefixtures("nan_scratch")
@pytest.mark.parametrize(
    ("tokens", "heads", "groups", "head_dim"),
    [(1, 1, 1, 2), (7, 12, 12, 64), (65, 6, 2, 24), (33, 3, 1, 256), (129, 14, 2, 8), (5, 32, 16, 80)],
)
def test_queries_keys_and_gradients_are_the_twins(tokens: int, heads: int, groups: int, head_dim: int) -> None:
    q, k = (draw(tokens, count, head_dim).requires_grad_() for count in (heads, groups))
    tables = angles(tokens, head_dim)
    found, expected = rotate(q, k, *tables), plain_rotate(q, k, *tables)
    for one, other in zip(found, expected, strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    for one, other in zip(gradients(found, q, k), gradients(expected, q, k), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("nan_scratch")
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 2, 6), (19, 12, 64), (66, 3, 40)])
def test_a_joined_projection_has_one_gradient(tokens: int, heads: int, head_dim: int) -> None:
    # A slice: ModernBERT's projection may come with more than it needs.
    qkv = draw(tokens, 4, heads, head_dim)[:, :3].requires_grad_()
    tables = angles(tokens, head_dim)
    found, expected = rotate_joined(qkv, *tables), plain_rotate_joined(qkv, *tables)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert len({one.untyped_storage().data_ptr() for one in (*found, qkv)}) == 2
    [one], [other] = gradients(found, qkv), gradients(expected, qkv)
    assert one.is_contiguous()
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_the_angles_of_a_padded_batch_repeat() -> None:
    tables = angles(5, 16)
    q, k = draw(15, 4, 16), draw(15, 2, 16)
    found = rotate(q, k, *(part[None] for part in tables))
    whole = rotate(q, k, *(part.repeat(3, 1) for part in tables))
    torch.testing.assert_close(found, whole, rtol=0, atol=0)
    torch.testing.assert_close(plain_rotate(q, k, *(part[None] for part in tables)), found, rtol=1e-6, atol=1e-6)


def test_slices_and_transposed_gradients() -> None:
    joined = draw(9, 3, 4, 16).requires_grad_()
    tables = angles(9, 16)
    weights = draw(16, 9, 4).permute(1, 2, 0)
    found, expected = (turn(joined[:, 0], joined[:, 2], *tables) for turn in (rotate, plain_rotate))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    grad, expected_grad = (torch.autograd.grad(each, joined, (weights, weights)) for each in (found, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float16])
def test_half_precision_is_rounded_once_as_modernbert_does(table_dtype: torch.dtype) -> None:
    # float16, because the interpreter truncates what it stores as bfloat16.
    q, k = (draw(33, 4, 16, dtype=torch.float16) for _ in range(2))
    cos, sin = angles(33, 16, table_dtype)
    found = rotate(q, k, cos, sin)
    theirs = apply_rotary_pos_emb(q[None].transpose(1, 2), k[None].transpose(1, 2), cos[None], sin[None])
    for one, other, plain in zip(found, theirs, plain_rotate(q, k, cos, sin), strict=True):
        other = other.transpose(1, 2)[0]
        assert one.dtype == other.dtype == torch.float16
        # A product that is not rounded before the sum may tip the rounding of single elements.
        assert (one != other).float().mean() < 0.01
        torch.testing.assert_close(plain, other, rtol=0, atol=0)


def test_what_is_not_finite_stays_where_it_is() -> None:
    qkv = draw(2, 3, 1, 4)
    qkv[0, 2, 0, 1] = torch.inf
    v = rotate_joined(qkv, *angles(2, 4))[2]
    torch.testing.assert_close(v, qkv[:, 2], rtol=0, atol=0)


def test_what_does_not_fit_is_named() -> None:
    q, k, tables = draw(6, 4, 16), draw(6, 2, 16), angles(6, 16)
    with pytest.raises(ArgumentError, match="expected q .T, H, D. and k .T, G, D."):
        rotate(q, k[:5], *tables)
    with pytest.raises(ArgumentError, match="whose rows divide the 6 tokens"):
        rotate(q, k, *(part[:4] for part in tables))
    with pytest.raises(ArgumentError, match="whose rows divide the 6 tokens"):
        rotate(q, k, *(part[:, :8] for part in tables))
    with pytest.raises(ArgumentError, match="an even number of numbers, at most 512"):
        rotate(q[..., :15], k[..., :15], *(part[:, :15] for part in tables))
    with pytest.raises(ArgumentError, match="not torch.float64"):
        rotate(q, k, tables[0].double(), tables[1])
    with pytest.raises(ArgumentError, match="expected queries, keys and values in one"):
        rotate_joined(q, *tables)
