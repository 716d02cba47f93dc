from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from embtune.errors import ArgumentError
from embtune.kernels.add_norm import add_norm, plain_add_norm

EPS = 1e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS: dict[str, dict[str, Any]] = {
    "layer": {"kind": "layer"},
    "rms": {"kind": "rms"},
    "gemma": {"kind": "rms", "unit_offset": True},
}


def inputs(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows * columns)
    shapes = ((rows, columns), (rows, columns), (columns,), (columns,))
    # Far from zero: a mean that is not taken away shows.
    parts = [torch.randn(shape, generator=generator) + (len(shape) > 1) for shape in shapes]
    return [part.to(DEVICE, dtype).requires_grad_() for part in parts]


def gradients(outs: tuple[Tensor, ...], parts: list[Tensor]) -> tuple[Tensor, ...]:
    weights = [
        torch.linspace(-1, 1, out.numel(), device=DEVICE, dtype=torch.float64).mul(50 + place).sin().view(out.shape)
        for place, out in enumerate(outs)
    ]
    return torch.autograd.grad(outs, parts, [each.to(out.dtype) for each, out in zip(weights, outs, strict=True)])


def twin(parts: list[Tensor], form: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    wide = [part.detach().double().requires_grad_() for part in parts]
    outs = plain_add_norm(*wide, EPS, **FORMS[form])
    return outs, gradients(outs, wide)


def test_the_twin_is_pytorchs_layer_norm() -> None:
    residual, hidden, weight, bias = (part.double() for part in inputs(9, 20))
    total, out = plain_add_norm(residual, hidden, weight, bias, EPS, "layer")
    torch.testing.assert_close(total, residual + hidden)
    torch.testing.assert_close(out, torch.nn.functional.layer_norm(residual + hidden, (20,), weight, bias, EPS))


@pytest.mark.usefixtures("nan_scratch")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 48), (3, 1100), (65, 64), (33, 100)])
def test_outputs_and_gradients_are_the_twins(rows: int, columns: int, form: str) -> None:
    parts = inputs(rows, columns)
    found, (expected, expected_gradients) = add_norm(*parts, EPS, **FORMS[form]), twin(parts, form)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=5e-6)
    for one, other in zip(gradients(found, parts), expected_gradients, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=2e-5)


@pytest.mark.usefixtures("nan_scratch")
@pytest.mark.parametrize("form", FORMS)
def test_without_a_sublayer_the_stream_goes_through(form: str) -> None:
    residual, _, weight, _ = inputs(9, 70)
    parts, settings = [residual, weight], FORMS[form]
    found = add_norm(residual, None, weight, None, EPS, **settings)
    expected = plain_add_norm(residual, None, weight, None, EPS, **settings)
    torch.testing.assert_close(found[0], residual, rtol=0, atol=0)
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients(found, parts), gradients(expected, parts), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stream", [torch.float16, torch.float32])
def test_a_half_precision_base_has_a_float32_stream(stream: torch.dtype, form: str) -> None:
    # float16, because the interpreter truncates what it stores as bfloat16.
    parts = inputs(33, 100, torch.float16)
    parts[0] = parts[0].detach().to(stream).requires_grad_()
    found, (expected, expected_gradients) = add_norm(*parts, EPS, **FORMS[form]), twin(parts, form)
    assert [each.dtype for each in found] == [torch.float32, torch.float16]
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-3, atol=1e-6)
    for part, one, other in zip(parts, gradients(found, parts), expected_gradients, strict=True):
        assert one.dtype == part.dtype
        torch.testing.assert_close(one.double(), other, rtol=2e-3, atol=5e-3)


def test_the_normalised_sum_has_the_dtype_asked_for() -> None:
    residual, hidden, weight, bias = inputs(5, 48, torch.float16)
    out = add_norm(residual, hidden, weight, bias, EPS, "layer", dtype=torch.float32)[1]
    assert out.dtype == torch.float32
    expected = plain_add_norm(residual, hidden, weight, bias, EPS, "layer", dtype=torch.float32)[1]
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=5e-6)
    gradient = torch.autograd.grad(out.sum(), hidden)[0]
    assert gradient.dtype == torch.float16


@pytest.mark.parametrize("wanted", range(4))
def test_each_gradient_is_right_when_it_is_the_only_one(wanted: int) -> None:
    parts = inputs(9, 64)
    everything = gradients(add_norm(*parts, EPS, "layer"), parts)
    alone = [part.detach().requires_grad_(index == wanted) for index, part in enumerate(parts)]
    total, out = add_norm(*alone, EPS, "layer")
    torch.testing.assert_close(gradients((total, out), [alone[wanted]])[0], everything[wanted])


@pytest.mark.parametrize("used", [0, 1])
def test_an_output_that_nobody_uses_adds_nothing(used: int) -> None:
    parts = inputs(9, 64)
    found = torch.autograd.grad(add_norm(*parts, EPS, "layer")[used].square().sum(), parts[:2])
    expected = torch.autograd.grad(plain_add_norm(*parts, EPS, "layer")[used].square().sum(), parts[:2])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.usefixtures("nan_scratch")
def test_parameters_gather_their_gradients_over_more_rows_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embtune.kernels.tiles._PROGRAMS", 4)
    parts = inputs(65, 520)
    found = gradients(add_norm(*parts, EPS, "layer"), parts)
    for one, other in zip(found, twin(parts, "layer")[1], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_no_gradient_is_kept_where_none_is_wanted() -> None:
    parts = inputs(3, 48)
    with torch.no_grad():
        total, out = add_norm(*parts, EPS, "rms")
    assert not total.requires_grad and not out.requires_grad
    torch.testing.assert_close((total, out), plain_add_norm(*parts, EPS, "rms"))


def test_what_does_not_fit_is_named() -> None:
    residual, hidden, weight, bias = inputs(3, 48)
    with pytest.raises(ArgumentError, match="differ in shape"):
        add_norm(residual, hidden[:2], weight, bias, EPS, "layer")
    with pytest.raises(ArgumentError, match=r"weight \(47,\) must be \[48\]"):
        add_norm(residual, hidden, weight[:47], bias, EPS, "layer")
    with pytest.raises(ArgumentError, match="kind='batch' is not known"):
        add_norm(residual, hidden, weight, bias, EPS, "batch")
    with pytest.raises(ArgumentError, match="not torch.float64"):
        add_norm(residual.double(), hidden, weight, bias, EPS, "layer")
