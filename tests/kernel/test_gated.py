import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from embtune.errors import ArgumentError
from embtune.kernels.gated import ACTIVATIONS, gated, gated_halves, plain_gated, plain_gated_halves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    # Wide enough for the flat ends of the activations.
    return (3 * torch.randn(rows, columns, generator=generator)).to(DEVICE, dtype).requires_grad_()


def gradients(out: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, out.numel(), device=DEVICE, dtype=torch.float64).sin().view(out.shape)
    return torch.autograd.grad(out, parts, weights.to(out.dtype))


def wide(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_()


@pytest.mark.usefixtures("nan_scratch")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("columns", [48, 64, 100, 300])
@pytest.mark.parametrize("rows", [1, 3, 65])
def test_both_forms_are_the_twins(rows: int, columns: int, activation: str) -> None:
    both = inputs(rows, 2 * columns)
    gate, up = (half.detach().contiguous().requires_grad_() for half in both.chunk(2, dim=1))
    wide_gate, wide_up, wide_both = wide(gate), wide(up), wide(both)
    expected = plain_gated(wide_gate, wide_up, activation)
    out, out_of_both = gated(gate, up, activation), gated_halves(both, activation)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out_of_both.double(), plain_gated_halves(wide_both, activation), rtol=1e-5, atol=1e-6)
    expected_gradients = gradients(expected, wide_gate, wide_up)
    for found, right in zip(gradients(out, gate, up), expected_gradients, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=5e-6)
    (found,) = gradients(out_of_both, both)
    torch.testing.assert_close(found.double(), torch.cat(expected_gradients, dim=1), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_numbers_neither_overflow_nor_spoil_gradients(activation: str) -> None:
    gate = torch.tensor([[-1e4, -88.0, -20.0, -0.0, 20.0, 88.0, 1e4]], device=DEVICE).requires_grad_()
    up = torch.ones_like(gate).requires_grad_()
    out = gated(gate, up, activation)
    expected = plain_gated(wide(gate), wide(up), activation)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    for gradient in gradients(out, gate, up):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype, activation: str) -> None:
    both = inputs(5, 200, dtype)
    out, wide_both = gated_halves(both, activation), wide(both)
    expected, rounding = plain_gated_halves(wide_both, activation), torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=rounding, atol=1e-6)
    (found,), (right,) = gradients(out, both), gradients(expected, wide_both)
    assert out.dtype == found.dtype == dtype
    torch.testing.assert_close(found.double(), right, rtol=2 * rounding, atol=2 * rounding)


def test_slices_and_leading_axes() -> None:
    product = inputs(6, 3 * 40)
    first, second, _ = product.view(2, 3, 120).split(40, dim=-1)
    out = gated(first, second, "silu")
    torch.testing.assert_close(out, plain_gated(first, second, "silu"))
    expected = gradients(plain_gated(first, second, "silu"), product)
    torch.testing.assert_close(gradients(out, product), expected)
    with torch.no_grad():
        torch.testing.assert_close(gated(first.mT, second.mT, "silu"), out.mT)


def test_two_dtypes_make_the_wider_one() -> None:
    gate, up = inputs(3, 48, torch.bfloat16), inputs(4, 48)[:3]
    out = gated(gate, up, "gelu")
    assert out.dtype == torch.float32
    assert [gradient.dtype for gradient in gradients(out, gate, up)] == [torch.bfloat16, torch.float32]


def test_what_does_not_fit_is_named() -> None:
    gate = inputs(3, 48)
    with pytest.raises(ArgumentError, match="activation='relu' is not known; use one of silu, gelu, gelu_tanh"):
        gated(gate, gate, "relu")
    with pytest.raises(ArgumentError, match=r"gate \(3, 48\) and up \(2, 48\)"):
        gated(gate, gate[:2], "silu")
    with pytest.raises(ArgumentError, match="cannot be halved"):
        gated_halves(gate[:, :47], "silu")
    with pytest.raises(ArgumentError, match="not torch.float64"):
        gated_halves(gate.double(), "silu")
