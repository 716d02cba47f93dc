"""Linear layers as one product, against each layer by itself."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from embtune.kernels.rounded import rounded_linears

TOKENS, COLUMNS = 7, 5


@pytest.mark.parametrize("sizes", [[6], [4, 2, 3]], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_outputs_and_gradients_are_those_of_each_layer(sizes: list[int], with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    x_TC, weights = draw(TOKENS, COLUMNS), [draw(size, COLUMNS) for size in sizes]
    biases = [draw(size) for size in sizes] if with_bias else []
    joined = torch.cat(weights).detach(), torch.cat(biases).detach() if biases else None
    found = rounded_linears(x_TC, *joined, weights, biases)
    expected = [F.linear(x_TC, weight, bias) for weight, bias in zip(weights, biases or [None] * 3, strict=False)]
    factors = [torch.randn(part.shape, generator=generator) for part in expected]
    leaves = [x_TC, *weights, *biases]

    def gradients(parts: tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, ...]:
        total = sum((part * factor).sum() for part, factor in zip(parts, factors, strict=True))
        return torch.autograd.grad(total, leaves)

    torch.testing.assert_close(list(found), expected)
    torch.testing.assert_close(gradients(found), gradients(expected))


def test_gradients_have_the_dtypes_of_what_they_belong_to() -> None:
    for x_dtype in (torch.float32, torch.bfloat16):
        x_TC = torch.randn(TOKENS, COLUMNS, dtype=x_dtype, requires_grad=True)
        weight, bias = torch.randn(4, COLUMNS, requires_grad=True), torch.randn(4, requires_grad=True)
        [out] = rounded_linears(x_TC, weight.detach().bfloat16(), bias.detach().bfloat16(), [weight], [bias])
        assert out.dtype == torch.bfloat16
        out.sum().backward()
        assert (x_TC.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (x_dtype, torch.float32, torch.float32)
        torch.testing.assert_close(bias.grad, torch.full((4,), float(TOKENS)))
