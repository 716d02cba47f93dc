import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from embtune.errors import ArgumentError
from embtune.kernels.layer_norm import dropout_add_layer_norm, plain_dropout_add_layer_norm

EPS = 1e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PARTS = ("hidden", "residual", "weight", "bias")


def inputs(rows: int, columns: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(rows * columns)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()

    return [draw(rows, columns), draw(rows, columns), draw(columns), draw(columns) if bias else None]


def seed(value: int = 7) -> Tensor:
    return torch.tensor([value], device=DEVICE)


def gradients(out: Tensor, parts: list[Tensor | None]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, out.numel(), device=DEVICE, dtype=torch.float64).sin().view(out.shape)
    return list(torch.autograd.grad(out, [part for part in parts if part is not None], weights.to(out.dtype)))


def twin(parts: list[Tensor | None], p: float = 0.0, keep: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    wide = [None if part is None else part.detach().double().requires_grad_() for part in parts]
    out = plain_dropout_add_layer_norm(*wide, EPS, p, keep)
    return out, gradients(out, wide)


@pytest.mark.usefixtures("nan_scratch")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("columns", [48, 64, 100])
@pytest.mark.parametrize("rows", [1, 3, 65])
def test_output_and_gradients_are_the_twins(rows: int, columns: int, bias: bool) -> None:
    parts = inputs(rows, columns, bias=bias)
    out = dropout_add_layer_norm(*parts, EPS)
    expected, expected_gradients = twin(parts)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-6)
    for found, right in zip(gradients(out, parts), expected_gradients, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("nan_scratch")
@pytest.mark.parametrize(("rows", "columns"), [(1, 100), (3, 48), (65, 64), (2, 1100)])
def test_backward_drops_what_forward_dropped(rows: int, columns: int) -> None:
    parts, p = inputs(rows, columns), 0.3
    out = dropout_add_layer_norm(*parts, EPS, p, seed())
    found = gradients(out, parts)
    expected, expected_gradients = twin(parts, p, keep=found[0] != 0)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-6)
    for gradient, right in zip(found, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), right, rtol=1e-5, atol=1e-5)


def kept(value: int, p: float, rows: int = 64, columns: int = 256) -> Tensor:
    zeros, ones = torch.zeros(rows, columns, device=DEVICE), torch.ones(rows, columns, device=DEVICE)
    return dropout_add_layer_norm(ones, zeros, ones[0], None, EPS, p, seed(value)) > 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_kept_share_is_one_minus_p_in_every_row_and_column(p: float) -> None:
    mask = kept(1, p).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(mask.mean() - (1 - p)) < 4 * sigma / mask.numel() ** 0.5
    for axis, other in ((0, 64), (1, 256)):
        shares = mask.mean(axis)
        assert (shares - (1 - p)).abs().max() < 5 * sigma / other**0.5
    # Neighbours, four of which come from one call of the random numbers, are independent of each other.
    for distance in (1, 2, 3, 4, 64):
        together = (mask[:, distance:] - 1 + p) * (mask[:, :-distance] - 1 + p)
        assert together.mean().abs() < 5 * sigma**2 / together.numel() ** 0.5


def test_the_seed_alone_decides_what_is_dropped() -> None:
    torch.testing.assert_close(kept(3, 0.5), kept(3, 0.5))
    assert (kept(3, 0.5) != kept(4, 0.5)).double().mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    parts = inputs(5, 100, dtype)
    out = dropout_add_layer_norm(*parts, EPS, 0.2, seed())
    found = gradients(out, parts)
    expected, expected_gradients = twin(parts, 0.2, keep=found[0] != 0)
    assert out.dtype == dtype and all(gradient.dtype == dtype for gradient in found)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=rounding, atol=rounding)
    for gradient, right in zip(found, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), right, rtol=4 * rounding, atol=4 * rounding)


def test_a_float32_residual_keeps_its_dtype_and_makes_the_result_float32() -> None:
    hidden, _, weight, bias = inputs(3, 48, torch.bfloat16)
    parts = [hidden, inputs(3, 48)[1], weight, bias]
    out = dropout_add_layer_norm(*parts, EPS)
    found = gradients(out, parts)
    expected, expected_gradients = twin(parts)
    assert out.dtype == torch.float32
    assert [gradient.dtype for gradient in found] == [part.dtype for part in parts]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-6)
    torch.testing.assert_close(found[1].double(), expected_gradients[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0].double(), expected_gradients[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("wanted", PARTS)
def test_each_gradient_is_right_when_it_is_the_only_one(wanted: str) -> None:
    parts = inputs(9, 64)
    everything = dict(zip(PARTS, gradients(dropout_add_layer_norm(*parts, EPS, 0.4, seed()), parts), strict=True))
    alone = [part.detach().requires_grad_(name == wanted) for name, part in zip(PARTS, parts, strict=True)]
    out = dropout_add_layer_norm(*alone, EPS, 0.4, seed())
    found = gradients(out, [part for part in alone if part.requires_grad])
    torch.testing.assert_close(found[0], everything[wanted])


def test_leading_axes_and_strided_states() -> None:
    hidden, residual, weight, bias = inputs(6, 48)
    expected = dropout_add_layer_norm(hidden, residual, weight, bias, EPS)
    apart = torch.stack([hidden, hidden], dim=2)[:, :, 0]
    out = dropout_add_layer_norm(apart.view(2, 3, 48), residual.view(2, 3, 48), weight, bias, EPS)
    torch.testing.assert_close(out, expected.view(2, 3, 48))
    with torch.no_grad():
        torch.testing.assert_close(dropout_add_layer_norm(hidden, residual, weight, bias, EPS), expected)


def test_no_rows() -> None:
    parts = inputs(0, 48)
    out = dropout_add_layer_norm(*parts, EPS)
    assert out.shape == (0, 48)
    assert all(not gradient.any() for gradient in gradients(out, parts))


def test_what_does_not_fit_is_named() -> None:
    hidden, residual, weight, bias = inputs(3, 48)
    with pytest.raises(ArgumentError, match=r"hidden \(3, 48\) and residual \(2, 48\)"):
        dropout_add_layer_norm(hidden, residual[:2], weight, bias, EPS)
    with pytest.raises(ArgumentError, match=r"bias \(47,\) must be \[48\]"):
        dropout_add_layer_norm(hidden, residual, weight, bias[:47], EPS)
    with pytest.raises(ArgumentError, match=r"p=1.0: the share"):
        dropout_add_layer_norm(hidden, residual, weight, bias, EPS, 1.0, seed())
    with pytest.raises(ArgumentError, match=r"p=0.1 needs a seed"):
        dropout_add_layer_norm(hidden, residual, weight, bias, EPS, 0.1)
    with pytest.raises(ArgumentError, match="not torch.float64"):
        dropout_add_layer_norm(hidden.double(), residual, weight, bias, EPS)
    wide = torch.ones(1, 8193, device=DEVICE)
    with pytest.raises(ArgumentError, match="rows of 8193 numbers"):
        dropout_add_layer_norm(wide, wide, wide[0], None, EPS)


@pytest.mark.usefixtures("nan_scratch")
def test_parameters_gather_their_gradient_over_more_rows_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embtune.kernels.tiles._PROGRAMS", 4)
    parts = inputs(65, 520)
    found = gradients(dropout_add_layer_norm(*parts, EPS), parts)
    for gradient, right in zip(found, twin(parts)[1], strict=True):
        torch.testing.assert_close(gradient.double(), right, rtol=1e-4, atol=1e-4)
