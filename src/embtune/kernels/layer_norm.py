"""LayerNorm(dropout(hidden) + residual) in one kernel each way, and the same in plain PyTorch.

The end of both halves of a BERT layer. Eager PyTorch reads and writes the [T, D] states five times for it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from embtune.errors import ArgumentError
from embtune.kernels.tiles import ColumnSums, check_dtypes, tile_of
from embtune.runtime import require_triton


def plain_dropout_add_layer_norm(
    hidden_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor | None,
    eps: float,
    p: float = 0.0,
    keep_TD: Tensor | None = None,
) -> Tensor:
    """The plain twin of `dropout_add_layer_norm`; `keep_TD` says which elements of `hidden_TD` dropout leaves."""
    if keep_TD is not None:
        hidden_TD = torch.where(keep_TD, hidden_TD / (1 - p), 0.0)
    return F.layer_norm(hidden_TD + residual_TD, weight_D.shape, weight_D, bias_D, eps)


def dropout_add_layer_norm(
    hidden_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor | None,
    eps: float,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """LayerNorm of dropout(hidden) + residual over the last axis (Ba et al. 2016), on Triton.

    Computed in float32 throughout. For the backward pass it keeps the sum, rounded to the result's dtype, and two
    float32 numbers a row; the dropped elements are found again from `seed`. Frozen parameters cost no work.

    Args:
        hidden_TD: what a sublayer computed: float32, bfloat16 or float16, [..., D].
        residual_TD: what is added to it, of the same shape; its dtype may be another.
        weight_D: LayerNorm's weight [D].
        bias_D: LayerNorm's bias [D], or None.
        eps: added to the variance.
        p: share of `hidden_TD` that is dropped; what is kept is divided by 1 - p.
        seed: int64 [1] on the device: the same seed drops the same elements. Read by the kernel itself, so that a
            CUDA graph which also records how the seed is drawn drops other elements with each replay.

    Returns:
        [..., D] in the dtype that `hidden_TD + residual_TD` has in PyTorch.

    Raises:
        ArgumentError: another dtype, shapes that do not fit, D over 8,192, p outside [0, 1), p without a seed, or a
            device that Triton does not serve.
        MissingPackageError: triton is not installed.
    """
    require_triton(hidden_TD.device, "dropout_add_layer_norm")
    check_dtypes("dropout_add_layer_norm", hidden_TD, residual_TD)
    columns = hidden_TD.shape[-1]
    if hidden_TD.shape != residual_TD.shape:
        raise ArgumentError(f"hidden {tuple(hidden_TD.shape)} and residual {tuple(residual_TD.shape)} differ in shape.")
    for name, parameter in (("weight", weight_D), ("bias", bias_D)):
        if parameter is not None and parameter.shape != (columns,):
            raise ArgumentError(f"{name} {tuple(parameter.shape)} must be [{columns}], the last axis of the states.")
    if not 0 <= p < 1:
        raise ArgumentError(f"p={p}: the share of dropped elements must be at least 0 and below 1.")
    if p > 0 and seed is None:
        raise ArgumentError(f"p={p} needs a seed: an int64 tensor of one element on {hidden_TD.device}.")
    hidden, residual = (states.reshape(-1, columns).contiguous() for states in (hidden_TD, residual_TD))
    seed = seed if p > 0 else None
    parts = (hidden, residual, weight_D, bias_D)
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts):
        out = _DropoutAddLayerNorm.apply(*parts, seed, eps, p)
    else:
        out = _forward(*parts, seed, eps, p, keep_sum=False)[0]
    return out.view(hidden_TD.shape)


def _dropping(p: float) -> tuple[float, int]:
    # What is kept is multiplied by the first number; an element is kept if its random int32 reaches the second.
    return 1 / (1 - p), min(round(p * 2**32) - 2**31, 2**31 - 1)


def _forward(
    hidden: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    p: float,
    *,
    keep_sum: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    from embtune.kernels.layer_norm_triton import add_norm_forward

    rows, columns = hidden.shape
    out = torch.empty_like(hidden, dtype=torch.promote_types(hidden.dtype, residual.dtype))
    total = mean = rstd = None
    if keep_sum:
        total = torch.empty_like(out)
        mean, rstd = (out.new_empty(rows, dtype=torch.float32) for _ in range(2))
    tile = tile_of(columns)
    with torch.cuda.device_of(hidden):
        add_norm_forward[(tile.count(rows),)](
            hidden,
            residual,
            weight.contiguous(),
            bias if bias is None else bias.contiguous(),
            seed,
            out,
            total,
            mean,
            rstd,
            rows,
            columns,
            eps,
            *_dropping(p),
            R=tile.rows,
            BLOCK=tile.block,
            num_warps=tile.warps,
        )
    return out, total, mean, rstd


class _DropoutAddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        eps: float,
        p: float,
    ) -> Tensor:
        out, total, mean, rstd = _forward(hidden, residual, weight, bias, seed, eps, p, keep_sum=True)
        ctx.save_for_backward(total, mean, rstd, weight, seed)
        ctx.p = p
        ctx.dtypes = hidden.dtype, residual.dtype, None if bias is None else bias.dtype
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from embtune.kernels.layer_norm_triton import add_norm_backward

        total, mean, rstd, weight, seed = ctx.saved_tensors
        hidden_dtype, residual_dtype, bias_dtype = ctx.dtypes
        for_hidden, for_residual, for_weight, for_bias = ctx.needs_input_grad[:4]
        rows, columns = total.shape
        tile = tile_of(columns)
        steps = tile.steps(rows) if for_weight or for_bias else 1
        programs = -(-tile.count(rows) // steps)
        # Without dropout both have the gradient of the sum: one tensor serves.
        shared = for_hidden and for_residual and seed is None and hidden_dtype == residual_dtype
        hidden_grad = torch.empty_like(total, dtype=hidden_dtype) if for_hidden and not shared else None
        residual_grad = torch.empty_like(total, dtype=residual_dtype) if for_residual else None
        sums = ColumnSums(total, programs, for_weight, for_bias)
        with torch.cuda.device_of(total):
            add_norm_backward[(programs,)](
                grad.contiguous(),
                total,
                weight.contiguous(),
                mean,
                rstd,
                seed,
                hidden_grad,
                residual_grad,
                *sums.parts,
                rows,
                columns,
                *_dropping(ctx.p),
                STEPS=steps,
                R=tile.rows,
                BLOCK=tile.block,
                num_warps=tile.warps,
            )
        return (
            residual_grad if shared else hidden_grad,
            residual_grad,
            *sums.totals(weight.dtype, bias_dtype),
            None,
            None,
            None,
        )
