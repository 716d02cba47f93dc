"""Linear layers that share their input, as autocast computes them, but in few kernels and with less rounding.

Autocast rounds the input for each layer, multiplies, and rounds each gradient to half precision before it is made
float32 again and added to the others. Here the layers are one product, and sums leave the matrix units as float32.

Shapes: T tokens, C numbers a token comes in with, D_i it leaves with, D their sum.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def rounded_linears(
    x_TC: Tensor, rounded_DC: Tensor, rounded_D: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """x·W_iᵀ + b_i of each layer, [T, D_i], in the dtype of `rounded_DC`.

    Args:
        x_TC: float32, or in that dtype; its gradient has its own.
        rounded_DC: the weights of all layers, rounded, below each other.
        rounded_D: their biases likewise, or None.
        weights: the weights that are trained, [D_i, C] float32; these get the gradients.
        biases: the biases that are trained, [D_i] float32, or nothing.
    """
    return _RoundedLinears.apply(x_TC, rounded_DC, rounded_D, len(weights), *weights, *biases)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, in float32 where the device can leave its float32 sums unrounded."""
    if left.is_cuda and left.dtype in _HALF:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


class _RoundedLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TC: Tensor, rounded_DC: Tensor, rounded_D: Tensor | None, count: int, *trained: Tensor
    ) -> tuple[Tensor, ...]:
        half_TC = x_TC.to(rounded_DC.dtype)
        ctx.save_for_backward(half_TC, rounded_DC)
        ctx.x_dtype, ctx.sizes = x_TC.dtype, [len(weight) for weight in trained[:count]]
        outputs = F.linear(half_TC, rounded_DC, rounded_D)
        # A view, as a part is, could not be changed in place.
        return (outputs,) if count == 1 else outputs.split(ctx.sizes, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        half_TC, rounded_DC = ctx.saved_tensors
        count = len(grads)
        needed = ctx.needs_input_grad
        grad_TD = grads[0] if count == 1 else torch.cat(grads, dim=1)
        x_grad = None
        if needed[0]:
            wide = ctx.x_dtype not in _HALF
            x_grad = product(grad_TD, rounded_DC).to(ctx.x_dtype) if wide else grad_TD @ rounded_DC
        found: list[Tensor | None] = [None] * (len(needed) - 4)
        if any(needed[4 : 4 + count]):
            found[:count] = product(grad_TD.T, half_TC).float().split(ctx.sizes)
        if any(needed[4 + count :]):
            found[count:] = _column_sums(grad_TD).split(ctx.sizes)
        return x_grad, None, None, None, *found


def _column_sums(x_TD: Tensor) -> Tensor:
    """The sum of all rows, [D] float32."""
    if x_TD.is_cuda and x_TD.dtype in _HALF:
        # PyTorch's sum of a [11,648, 1,536] matrix takes an H200 24 µs, the product with a row of ones 11.
        return torch.mm(x_TD.new_ones(1, len(x_TD)), x_TD, out_dtype=torch.float32)[0]
    return x_TD.sum(0, dtype=torch.float32)
