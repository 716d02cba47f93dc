"""Linear layers that share their input, with adapters, against the same operation by operation."""

from itertools import chain

import pytest
import torch
from torch import Tensor

from embtune.kernels.low_rank import LowRankLinear, low_rank_linears, plain_low_rank_linears

TOKENS, WIDTH = 37, 24


def layers(dtype: torch.dtype, adapters: torch.dtype, count: int = 3) -> list[LowRankLinear]:
    generator = torch.Generator().manual_seed(3)

    def make(*shape: int, of: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).div(5).to(of)

    shapes = [(24, 4, 2.0, True), (12, 3, 0.5, False), (40, 8, 1.0, True)][:count]
    return [
        LowRankLinear(
            make(out, WIDTH, of=dtype),
            make(out, of=dtype) if biased else None,
            make(rank, WIDTH, of=adapters).requires_grad_(),
            make(out, rank, of=adapters).requires_grad_(),
            scaling,
        )
        for out, rank, scaling, biased in shapes
    ]


def outputs_and_gradients(compute: object, x: Tensor, stack: list[LowRankLinear]) -> list[Tensor]:
    outputs = compute(x, stack)
    # Weights that bfloat16 holds exactly: what differs is what the products rounded.
    weights = [torch.arange(output.numel()).view_as(output) % 5 - 2 for output in outputs]
    loss = sum((output.double() * weight).sum() for output, weight in zip(outputs, weights, strict=True))
    trained = [x, *chain.from_iterable((layer.a_RC, layer.b_DR) for layer in stack)]
    gradients = torch.autograd.grad(loss, [tensor for tensor in trained if tensor.requires_grad])
    return [output.detach() for output in outputs] + list(gradients)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("input_grad", [True, False])
def test_products_and_every_gradient_are_those_of_the_plain_twin(count: int, input_grad: bool) -> None:
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=input_grad)
    stack = layers(torch.float64, torch.float64, count)
    found = outputs_and_gradients(low_rank_linears, x, stack)
    expected = outputs_and_gradients(plain_low_rank_linears, x, stack)
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float64_as_the_plain_twin(dtype: torch.dtype) -> None:
    x = torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_()
    stack = layers(dtype, torch.float32)
    exact = [
        LowRankLinear(
            layer.weight_DC.double(),
            None if layer.bias_D is None else layer.bias_D.double(),
            layer.a_RC.detach().double().requires_grad_(),
            layer.b_DR.detach().double().requires_grad_(),
            layer.scaling,
        )
        for layer in stack
    ]
    truth = outputs_and_gradients(plain_low_rank_linears, x.detach().double().requires_grad_(), exact)
    found = outputs_and_gradients(low_rank_linears, x, stack)
    plain = outputs_and_gradients(plain_low_rank_linears, x, stack)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in plain]
    for ours, twin, exactly in zip(found, plain, truth, strict=True):
        assert (ours - exactly).norm() <= 1.3 * (twin - exactly).norm() + 1e-6


def test_outputs_that_nobody_uses_and_gradients_that_nobody_wants_cost_nothing() -> None:
    x = torch.randn(TOKENS, WIDTH)
    stack = layers(torch.float32, torch.float32)
    used, *_ = low_rank_linears(x, stack)
    used.sum().backward()
    assert x.grad is None
    assert stack[0].a_RC.grad.abs().sum() > 0
    assert stack[1].a_RC.grad.abs().sum() == 0
