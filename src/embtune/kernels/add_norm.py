"""A residual stream in float32: what a sublayer computed is added, and the sum normalised, in one kernel each way.

The beginning of both halves of a pre-norm layer, and the same in plain PyTorch. LayerNorm: Ba et al. 2016; RMSNorm:
Zhang and Sennrich 2019.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from embtune.errors import ArgumentError
from embtune.kernels.tiles import ColumnSums, check_dtypes, tile_of
from embtune.runtime import require_triton

NormKind = Literal["layer", "rms"]


def plain_add_norm(
    residual: Tensor,
    hidden: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor | None,
    eps: float,
    kind: NormKind,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The plain twin of `add_norm`; float64 stays float64."""
    wide = torch.promote_types(residual.dtype, torch.float32)
    total = residual if hidden is None else residual.to(wide) + hidden.to(wide)
    x = total.to(wide)
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    scale = weight_D.to(wide) + 1 if unit_offset else weight_D.to(wide)
    out = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale
    return total, (out if bias_D is None else out + bias_D).to(dtype or weight_D.dtype)


def add_norm(
    residual: Tensor,
    hidden: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor | None,
    eps: float,
    kind: NormKind,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """residual + hidden, and its norm over the last axis, on Triton, in float32 throughout.

    For the backward pass it keeps the normalised sum in `dtype` and a float32 for each row; the sum itself may go.

    Args:
        residual: the stream: float32, bfloat16 or float16, [..., D].
        hidden: what a sublayer computed, of the same shape; its dtype may be another. None adds nothing.
        weight_D: the norm's scale [D].
        bias_D: the norm's bias [D], or None.
        eps: added to the variance, or to the mean square.
        kind: `layer` for LayerNorm, `rms` for RMSNorm.
        unit_offset: Gemma's form: the scale is 1 + weight.
        dtype: of what is normalised; None for that of the weight.

    Returns:
        The sum, float32, or the residual as it is where nothing is added; and the normalised sum in `dtype`.

    Raises:
        ArgumentError: another kind or dtype, shapes that do not fit, D over 8,192, or a device that Triton does not
            serve.
        MissingPackageError: triton is not installed.
    """
    require_triton(residual.device, "add_norm")
    parts = [part for part in (residual, hidden, weight_D, bias_D) if part is not None]
    check_dtypes("add_norm", *parts)
    columns = residual.shape[-1]
    if kind not in ("layer", "rms"):
        raise ArgumentError(f"kind={kind!r} is not known; use 'layer' or 'rms'.")
    if hidden is not None and hidden.shape != residual.shape:
        raise ArgumentError(f"hidden {tuple(hidden.shape)} and residual {tuple(residual.shape)} differ in shape.")
    for name, parameter in (("weight", weight_D), ("bias", bias_D)):
        if parameter is not None and parameter.shape != (columns,):
            raise ArgumentError(f"{name} {tuple(parameter.shape)} must be [{columns}], the last axis of the states.")
    inputs = (_rows(residual), None if hidden is None else _rows(hidden), weight_D, bias_D)
    settings = (eps, kind == "layer", unit_offset, dtype or weight_D.dtype)
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        total, out = _AddNorm.apply(*inputs, *settings)
    else:
        total, out, _, _ = _forward(*inputs, *settings, keep=False)
    return total.view(residual.shape), out.view(residual.shape)


def _rows(states: Tensor) -> Tensor:
    return states.reshape(-1, states.shape[-1]).contiguous()


def _forward(
    residual: Tensor,
    hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    unit_offset: bool,
    dtype: torch.dtype,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    from embtune.kernels.add_norm_triton import add_norm_forward

    rows, columns = residual.shape
    total = None if hidden is None else torch.empty_like(residual, dtype=torch.float32)
    out = torch.empty_like(residual, dtype=dtype)
    normal = torch.empty_like(out) if keep else None
    rstd = residual.new_empty(rows, dtype=torch.float32) if keep else None
    tile = tile_of(columns)
    with torch.cuda.device_of(residual):
        add_norm_forward[(tile.count(rows),)](
            residual,
            hidden,
            weight.contiguous(),
            bias if bias is None else bias.contiguous(),
            total,
            out,
            normal,
            rstd,
            rows,
            columns,
            eps,
            CENTRED=centred,
            UNIT_OFFSET=unit_offset,
            R=tile.rows,
            BLOCK=tile.block,
            num_warps=tile.warps,
        )
    return residual if total is None else total, out, normal, rstd


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        hidden: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        centred: bool,
        unit_offset: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        settings = (eps, centred, unit_offset, dtype)
        total, out, normal, rstd = _forward(residual, hidden, weight, bias, *settings, keep=True)
        ctx.save_for_backward(normal, rstd, weight)
        ctx.centred, ctx.unit_offset = centred, unit_offset
        ctx.dtypes = residual.dtype, None if hidden is None else hidden.dtype, None if bias is None else bias.dtype
        # The last norm of a model leaves the sum to nobody: its gradient is then None, and no zeros are read.
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, total_grad: Tensor | None, out_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        from embtune.kernels.add_norm_triton import add_norm_backward

        normal, rstd, weight = ctx.saved_tensors
        residual_dtype, hidden_dtype, bias_dtype = ctx.dtypes
        for_residual, for_hidden, for_weight, for_bias = ctx.needs_input_grad[:4]
        rows, columns = normal.shape
        tile = tile_of(columns)
        steps = tile.steps(rows) if for_weight or for_bias else 1
        programs = -(-tile.count(rows) // steps)
        # Both have the gradient of the sum: in one dtype, one tensor serves.
        shared = for_residual and for_hidden and residual_dtype == hidden_dtype
        residual_grad = torch.empty_like(normal, dtype=residual_dtype) if for_residual else None
        hidden_grad = torch.empty_like(normal, dtype=hidden_dtype) if for_hidden and not shared else None
        sums = ColumnSums(normal, programs, for_weight, for_bias)
        with torch.cuda.device_of(normal):
            add_norm_backward[(programs,)](
                total_grad if total_grad is None else total_grad.contiguous(),
                torch.zeros_like(normal) if out_grad is None else out_grad.contiguous(),
                normal,
                rstd,
                weight.contiguous(),
                residual_grad,
                hidden_grad,
                *sums.parts,
                rows,
                columns,
                CENTRED=ctx.centred,
                UNIT_OFFSET=ctx.unit_offset,
                STEPS=steps,
                R=tile.rows,
                BLOCK=tile.block,
                num_warps=tile.warps,
            )
        return (
            residual_grad,
            residual_grad if shared else hidden_grad,
            *sums.totals(weight.dtype, bias_dtype),
            None,
            None,
            None,
            None,
        )
