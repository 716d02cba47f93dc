# mypy: disallow-untyped-defs=False
"""Triton kernels of `rms_norm`: a program holds tiles of R whole rows [R, BLOCK] in float32. Needs triton.

T rows, D columns; optional pointers are None, and what belongs to them is then not compiled.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def rms_forward(
    x_TD, weight_D, out_TD, rstd_T, T, D, eps, UNIT_OFFSET: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr
):
    # 64 bits: a long row of tokens times its columns passes 2**31.
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, BLOCK)
    real = (row < T)[:, None] & (column < D)[None, :]
    at = row[:, None] * D + column[None, :]
    x = tl.load(x_TD + at, mask=real, other=0.0).to(tl.float32)
    weight = tl.load(weight_D + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    normal = x * rstd[:, None]
    if UNIT_OFFSET:
        weight += 1.0
    else:
        normal = normal.to(x_TD.dtype.element_ty).to(tl.float32)
    tl.store(out_TD + at, normal * weight, mask=real)
    if rstd_T is not None:
        tl.store(rstd_T + row, rstd, mask=row < T)


@triton.jit(do_not_specialize=["T"])
def rms_backward(
    grad_TD,
    x_TD,
    weight_D,
    rstd_T,
    x_grad_TD,
    weight_parts_PD,
    T,
    D,
    UNIT_OFFSET: tl.constexpr,
    STEPS: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_D + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    if UNIT_OFFSET:
        weight += 1.0
    weight_part = tl.zeros([R, BLOCK], tl.float32)
    for step in range(STEPS):
        row = (program * STEPS + step) * R + tl.arange(0, R)
        real = (row < T)[:, None] & (column < D)[None, :]
        at = row[:, None] * D + column[None, :]
        grad = tl.load(grad_TD + at, mask=real, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_T + row, mask=row < T, other=0.0)[:, None]
        normal = tl.load(x_TD + at, mask=real, other=0.0).to(tl.float32) * rstd
        if x_grad_TD is not None:
            scaled = grad * weight
            along = (tl.sum(scaled * normal, axis=1) / D)[:, None]
            tl.store(x_grad_TD + at, (scaled - normal * along) * rstd, mask=real)
        weight_part += grad * normal
    if weight_parts_PD is not None:
        tl.store(weight_parts_PD + program * D + column, tl.sum(weight_part, axis=0), mask=column < D)
