# mypy: disallow-untyped-defs=False
"""Triton kernels of `add_norm`: a program holds tiles of R whole rows [R, BLOCK] in float32. Needs triton.

T rows, D columns; optional pointers are None, and what belongs to them is then not compiled.
"""

import triton
import triton.language as tl


@triton.jit
def _scale(weight_D, column, D, UNIT_OFFSET: tl.constexpr):
    weight = tl.load(weight_D + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    if UNIT_OFFSET:
        weight += 1.0
    return weight


@triton.jit(do_not_specialize=["T"])
def add_norm_forward(
    residual_TD,
    hidden_TD,
    weight_D,
    bias_D,
    sum_TD,
    out_TD,
    normal_TD,
    rstd_T,
    T,
    D,
    eps,
    CENTRED: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 64 bits: a long row of tokens times its columns passes 2**31.
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, BLOCK)
    real = (row < T)[:, None] & (column < D)[None, :]
    at = row[:, None] * D + column[None, :]
    x = tl.load(residual_TD + at, mask=real, other=0.0).to(tl.float32)
    if hidden_TD is not None:
        x += tl.load(hidden_TD + at, mask=real, other=0.0).to(tl.float32)
        tl.store(sum_TD + at, x, mask=real)
    if CENTRED:
        x = tl.where(real, x - (tl.sum(x, axis=1) / D)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    normal = x * rstd[:, None]
    y = normal * _scale(weight_D, column, D, UNIT_OFFSET)
    if bias_D is not None:
        y += tl.load(bias_D + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    tl.store(out_TD + at, y, mask=real)
    if normal_TD is not None:
        tl.store(normal_TD + at, normal, mask=real)
        tl.store(rstd_T + row, rstd, mask=row < T)


@triton.jit(do_not_specialize=["T"])
def add_norm_backward(
    sum_grad_TD,
    out_grad_TD,
    normal_TD,
    rstd_T,
    weight_D,
    residual_grad_TD,
    hidden_grad_TD,
    weight_parts_PD,
    bias_parts_PD,
    T,
    D,
    CENTRED: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    STEPS: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    weight = _scale(weight_D, column, D, UNIT_OFFSET)
    weight_part = tl.zeros([R, BLOCK], tl.float32)
    bias_part = tl.zeros([R, BLOCK], tl.float32)
    for step in range(STEPS):
        row = (program * STEPS + step) * R + tl.arange(0, R)
        real = (row < T)[:, None] & (column < D)[None, :]
        at = row[:, None] * D + column[None, :]
        grad = tl.load(out_grad_TD + at, mask=real, other=0.0).to(tl.float32)
        normal = tl.load(normal_TD + at, mask=real, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_T + row, mask=row < T, other=0.0)
        scaled = grad * weight
        x_grad = scaled - normal * (tl.sum(scaled * normal, axis=1) / D)[:, None]
        if CENTRED:
            x_grad -= (tl.sum(scaled, axis=1) / D)[:, None]
        x_grad *= rstd[:, None]
        if sum_grad_TD is not None:
            x_grad += tl.load(sum_grad_TD + at, mask=real, other=0.0).to(tl.float32)
        if residual_grad_TD is not None:
            tl.store(residual_grad_TD + at, x_grad, mask=real)
        if hidden_grad_TD is not None:
            tl.store(hidden_grad_TD + at, x_grad, mask=real)
        weight_part += grad * normal
        bias_part += grad
    if weight_parts_PD is not None:
        tl.store(weight_parts_PD + program * D + column, tl.sum(weight_part, axis=0), mask=column < D)
    if bias_parts_PD is not None:
        tl.store(bias_parts_PD + program * D + column, tl.sum(bias_part, axis=0), mask=column < D)
