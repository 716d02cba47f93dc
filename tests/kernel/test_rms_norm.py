import pytest
import torch
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

pytest.importorskip("triton")

from embtune.errors import ArgumentError
from embtune.kernels.rms_norm import plain_rms_norm, rms_norm

EPS = 1e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * columns)
    x = torch.randn(rows, columns, generator=generator).to(DEVICE, dtype).requires_grad_()
    return x, torch.randn(columns, generator=generator).to(DEVICE, dtype).requires_grad_()


def gradients(out: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, out.numel(), device=DEVICE, dtype=torch.float64).sin().view(out.shape)
    return torch.autograd.grad(out, parts, weights.to(out.dtype))


def twin(x: Tensor, weight: Tensor, unit_offset: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    wide = [part.detach().double().requires_grad_() for part in (x, weight)]
    out = plain_rms_norm(*wide, EPS, unit_offset)
    return out, gradients(out, *wide)


@pytest.mark.usefixtures("nan_scratch")
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("columns", [48, 64, 100, 1100])
@pytest.mark.parametrize("rows", [1, 3, 65])
def test_output_and_gradients_are_the_twins(rows: int, columns: int, unit_offset: bool) -> None:
    x, weight = inputs(rows, columns)
    out = rms_norm(x, weight, EPS, unit_offset)
    expected, expected_gradients = twin(x, weight, unit_offset)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=5e-6)
    for found, right in zip(gradients(out, x, weight), expected_gradients, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unit_offset", [False, True])
def test_half_precision_is_rounded_as_transformers_does(unit_offset: bool) -> None:
    # float16, because the interpreter truncates what it stores as bfloat16.
    x, weight = inputs(33, 100, torch.float16)
    theirs = (Gemma3RMSNorm if unit_offset else Qwen3RMSNorm)(100, eps=EPS)
    theirs.weight = torch.nn.Parameter(weight.detach())
    out, expected = rms_norm(x, weight, EPS, unit_offset), theirs(x)
    # A sum in another order may tip the rounding of single elements.
    assert out.dtype == expected.dtype == torch.float16
    assert (out != expected).float().mean() < 0.005
    torch.testing.assert_close(plain_rms_norm(x, weight, EPS, unit_offset), expected, rtol=0, atol=0)
    _, expected_gradients = twin(x, weight, unit_offset)
    for found, right in zip(gradients(out, x, weight), expected_gradients, strict=True):
        assert found.dtype == torch.float16
        torch.testing.assert_close(found.double(), right, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("unit_offset", [False, True])
def test_a_float32_weight_gives_the_dtype_that_transformers_gives(unit_offset: bool) -> None:
    x, _ = inputs(3, 48, torch.bfloat16)
    weight = inputs(3, 48)[1]
    out, expected = rms_norm(x, weight, EPS, unit_offset), plain_rms_norm(x, weight, EPS, unit_offset)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-6)
    assert [gradient.dtype for gradient in gradients(out, x, weight)] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("wanted", [0, 1])
def test_each_gradient_is_right_when_it_is_the_only_one(wanted: int) -> None:
    parts = inputs(9, 64)
    everything = gradients(rms_norm(*parts, EPS), *parts)
    alone = [part.detach().requires_grad_(index == wanted) for index, part in enumerate(parts)]
    torch.testing.assert_close(gradients(rms_norm(*alone, EPS), alone[wanted])[0], everything[wanted])


@pytest.mark.usefixtures("nan_scratch")
def test_the_weight_gathers_its_gradient_over_more_rows_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embtune.kernels.tiles._PROGRAMS", 4)
    x, weight = inputs(65, 520)
    found = gradients(rms_norm(x, weight, EPS), x, weight)
    for gradient, right in zip(found, twin(x, weight, False)[1], strict=True):
        torch.testing.assert_close(gradient.double(), right, rtol=1e-4, atol=1e-4)


def test_heads_of_a_slice() -> None:
    x, weight = inputs(6, 4 * 16)
    heads = x.view(2, 3, 4, 16)[..., :2, :]
    out = rms_norm(heads, weight[:16], EPS)
    torch.testing.assert_close(out, plain_rms_norm(heads, weight[:16], EPS))
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(heads, weight[:16], EPS), out)


def test_what_does_not_fit_is_named() -> None:
    x, weight = inputs(3, 48)
    with pytest.raises(ArgumentError, match=r"weight \(47,\) must be \[48\]"):
        rms_norm(x, weight[:47], EPS)
    with pytest.raises(ArgumentError, match="not torch.float64"):
        rms_norm(x.double(), weight, EPS)
