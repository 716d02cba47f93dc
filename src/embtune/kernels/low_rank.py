"""Linear layers with LoRA adapters that share their input, in few matrix products and no element-wise kernels.

y_i = x·W_iᵀ + bias_i + s_i·(x·A_iᵀ)·B_iᵀ (Hu et al. 2021, arXiv:2106.09685, eq. 3). The low-rank products are added by
the matrix products themselves (`addmm`), x is kept once for all layers, and the frozen W_i get no gradient.

Shapes: T tokens, C numbers a token comes in with, D_i it leaves with, r_i the ranks, R their sum.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embtune.kernels.rounded import product


@dataclass(frozen=True)
class LowRankLinear:
    """One layer: a frozen weight, and an adapter that is trained."""

    weight_DC: Tensor
    bias_D: Tensor | None
    a_RC: Tensor
    b_DR: Tensor
    scaling: float


def low_rank_linears(x_TC: Tensor, layers: Sequence[LowRankLinear]) -> tuple[Tensor, ...]:
    """The outputs [T, D_i] of several layers for one input, in its dtype.

    Args:
        x_TC: in the dtype of all `weight_DC` and `bias_D`. Adapters may be float32; they are rounded for the products,
            and their gradients have their own dtype.
    """
    tensors = itertools.chain.from_iterable((each.weight_DC, each.bias_D, each.a_RC, each.b_DR) for each in layers)
    return _LowRankLinears.apply(x_TC, tuple(each.scaling for each in layers), *tensors)


def plain_low_rank_linears(x_TC: Tensor, layers: Sequence[LowRankLinear]) -> tuple[Tensor, ...]:
    """What `low_rank_linears` computes, operation by operation, in the dtype of the input."""
    a_and_b = [(layer.a_RC.to(x_TC.dtype), layer.b_DR.to(x_TC.dtype)) for layer in layers]
    return tuple(
        F.linear(x_TC, layer.weight_DC, layer.bias_D) + F.linear(F.linear(x_TC, a_RC), b_DR) * layer.scaling
        for layer, (a_RC, b_DR) in zip(layers, a_and_b, strict=True)
    )


# One operator, so that checkpointing can keep its result: that of an operation in place it could not.
@torch.library.custom_op("embtune::adapted_linear", mutates_args=())
def _adapted_linear(x_TC: Tensor, weight_DC: Tensor, bias_D: Tensor | None, low_TR: Tensor, b_DR: Tensor) -> Tensor:
    return F.linear(x_TC, weight_DC, bias_D).addmm_(low_TR, b_DR.T)


@_adapted_linear.register_fake
def _like_a_linear(x_TC: Tensor, weight_DC: Tensor, *_: Tensor | None) -> Tensor:
    return x_TC.new_empty(len(x_TC), len(weight_DC))


ADAPTED_LINEAR = torch.ops.embtune.adapted_linear.default
"""The operator, by which those that watch what PyTorch computes know it."""


class _LowRankLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, scalings: tuple[float, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, biases, a_s = tensors[::4], tensors[1::4], tensors[2::4]
        b_s = [b_DR.to(x_TC.dtype) for b_DR in tensors[3::4]]
        ctx.scalings, ctx.adapter_dtypes = (
            scalings,
            [(a.dtype, b.dtype) for a, b in zip(a_s, tensors[3::4], strict=True)],
        )
        ranks = [b_DR.shape[1] for b_DR in b_s]
        scaled_a_RC = x_TC.new_empty(sum(ranks), x_TC.shape[1])
        for a_RC, scaling, place_RC in zip(a_s, scalings, scaled_a_RC.split(ranks), strict=True):
            torch.mul(a_RC, scaling, out=place_RC)
        low_TR = x_TC @ scaled_a_RC.T
        outputs = []
        for weight_DC, bias_D, b_DR, low_Tr in zip(weights, biases, b_s, low_TR.split(ranks, dim=1), strict=True):
            outputs.append(_adapted_linear(x_TC, weight_DC, bias_D, low_Tr, b_DR))
        ctx.save_for_backward(x_TC, low_TR, scaled_a_RC, *b_s, *weights)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TC, low_TR, scaled_a_RC, *rest = ctx.saved_tensors
        b_s, weights = rest[: len(grads)], rest[len(grads) :]
        ranks = [b_DR.shape[1] for b_DR in b_s]
        up_TR = torch.cat([grad_TD @ b_DR for grad_TD, b_DR in zip(grads, b_s, strict=True)], dim=1)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = up_TR @ scaled_a_RC
            for grad_TD, weight_DC in zip(grads, weights, strict=True):
                x_grad.addmm_(grad_TD, weight_DC)
        a_grads = product(up_TR.T, x_TC).split(ranks)
        found: list[Tensor | None] = []
        for index, (grad_TD, low_Tr) in enumerate(zip(grads, low_TR.split(ranks, dim=1), strict=True)):
            a_dtype, b_dtype = ctx.adapter_dtypes[index]
            a_grad = (a_grads[index] * ctx.scalings[index]).to(a_dtype)
            found += [None, None, a_grad, product(grad_TD.T, low_Tr).to(b_dtype)]
        return x_grad, None, *found
