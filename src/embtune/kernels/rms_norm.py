"""RMSNorm as Llama, Qwen and Gemma round it, in one kernel each way, and the same in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor

from embtune.errors import ArgumentError
from embtune.kernels.tiles import ColumnSums, check_dtypes, tile_of
from embtune.runtime import require_triton


def plain_rms_norm(x: Tensor, weight_D: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """The plain twin of `rms_norm`, with the same rounding; float64 stays float64."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (normal * (1.0 + weight_D.to(wide.dtype))).to(x.dtype)
    return weight_D * normal.to(x.dtype)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """RMSNorm over the last axis (Zhang and Sennrich 2019), on Triton: weight · x / sqrt(mean(x²) + eps).

    Args:
        x: float32, bfloat16 or float16, [..., D]; normalised in float32.
        weight_D: the scale [D].
        eps: added to the mean square.
        unit_offset: Gemma's form: the scale is 1 + weight, and only the product is rounded to x's dtype. Without it,
            Llama's: the normalised x is rounded to its dtype first, then multiplied by the weight.

    Returns:
        [..., D] in x's dtype; without `unit_offset` in the dtype that PyTorch gives a product of x and weight.

    Raises:
        ArgumentError: another dtype, a weight of another length, D over 8,192, or a device that Triton does not serve.
        MissingPackageError: triton is not installed.
    """
    require_triton(x.device, "rms_norm")
    check_dtypes("rms_norm", x)
    columns = x.shape[-1]
    if weight_D.shape != (columns,):
        raise ArgumentError(f"weight {tuple(weight_D.shape)} must be [{columns}], the last axis of x.")
    rows = x.reshape(-1, columns).contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or weight_D.requires_grad):
        out = _RMSNorm.apply(rows, weight_D, eps, unit_offset)
    else:
        out = _forward(rows, weight_D, eps, unit_offset, keep_rstd=False)[0]
    return out.view(x.shape)


def _forward(
    x: Tensor, weight: Tensor, eps: float, unit_offset: bool, *, keep_rstd: bool
) -> tuple[Tensor, Tensor | None]:
    from embtune.kernels.rms_norm_triton import rms_forward

    rows, columns = x.shape
    out = torch.empty_like(x, dtype=x.dtype if unit_offset else torch.promote_types(x.dtype, weight.dtype))
    rstd = x.new_empty(rows, dtype=torch.float32) if keep_rstd else None
    tile = tile_of(columns)
    with torch.cuda.device_of(x):
        rms_forward[(tile.count(rows),)](
            x,
            weight.contiguous(),
            out,
            rstd,
            rows,
            columns,
            eps,
            UNIT_OFFSET=unit_offset,
            R=tile.rows,
            BLOCK=tile.block,
            num_warps=tile.warps,
        )
    return out, rstd


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
        out, rstd = _forward(x, weight, eps, unit_offset, keep_rstd=True)
        ctx.save_for_backward(x, weight, rstd)
        ctx.unit_offset = unit_offset
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        from embtune.kernels.rms_norm_triton import rms_backward

        x, weight, rstd = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad[:2]
        rows, columns = x.shape
        tile = tile_of(columns)
        steps = tile.steps(rows) if for_weight else 1
        programs = -(-tile.count(rows) // steps)
        x_grad = torch.empty_like(x) if for_x else None
        sums = ColumnSums(x, programs, for_weight)
        with torch.cuda.device_of(x):
            rms_backward[(programs,)](
                grad.contiguous(),
                x,
                weight.contiguous(),
                rstd,
                x_grad,
                *sums.parts,
                rows,
                columns,
                UNIT_OFFSET=ctx.unit_offset,
                STEPS=steps,
                R=tile.rows,
                BLOCK=tile.block,
                num_warps=tile.warps,
            )
        [weight_grad] = sums.totals(weight.dtype)
        return x_grad, weight_grad, None, None
