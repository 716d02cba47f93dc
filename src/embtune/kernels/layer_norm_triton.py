# mypy: disallow-untyped-defs=False
"""Triton kernels of `layer_norm`: a program holds tiles of R whole rows [R, BLOCK] in float32. Needs triton.

T rows, D columns; optional pointers are None, and what belongs to them is then not compiled.
"""

import triton
import triton.language as tl


@triton.jit
def _kept(seed, row_R, threshold, R: tl.constexpr, BLOCK: tl.constexpr):
    # One call of Philox gives four numbers; asking it anew for each element would cost more than the memory traffic.
    quarter: tl.constexpr = BLOCK // 4
    place = row_R.to(tl.int32)[:, None] * quarter + tl.arange(0, quarter)[None, :]
    first, second, third, fourth = tl.randint4x(tl.load(seed), place)
    bits = tl.reshape(tl.join(tl.join(first, second), tl.join(third, fourth)), [R, BLOCK])
    return bits.to(tl.int32, bitcast=True) >= threshold


@triton.jit(do_not_specialize=["T", "threshold"])
def add_norm_forward(
    hidden_TD,
    residual_TD,
    weight_D,
    bias_D,
    seed,
    out_TD,
    sum_TD,
    mean_T,
    rstd_T,
    T,
    D,
    eps,
    scale,
    threshold,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 64 bits: a long row of tokens times its columns passes 2**31.
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, BLOCK)
    real = (row < T)[:, None] & (column < D)[None, :]
    at = row[:, None] * D + column[None, :]
    x = tl.load(hidden_TD + at, mask=real, other=0.0).to(tl.float32)
    if seed is not None:
        x = tl.where(_kept(seed, row, threshold, R, BLOCK), x * scale, 0.0)
    x += tl.load(residual_TD + at, mask=real, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / D
    centred = tl.where(real, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + eps)
    y = centred * rstd[:, None] * tl.load(weight_D + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    if bias_D is not None:
        y += tl.load(bias_D + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    tl.store(out_TD + at, y, mask=real)
    if sum_TD is not None:
        tl.store(sum_TD + at, x, mask=real)
        tl.store(mean_T + row, mean, mask=row < T)
        tl.store(rstd_T + row, rstd, mask=row < T)


@triton.jit(do_not_specialize=["T", "threshold"])
def add_norm_backward(
    grad_TD,
    sum_TD,
    weight_D,
    mean_T,
    rstd_T,
    seed,
    hidden_grad_TD,
    residual_grad_TD,
    weight_parts_PD,
    bias_parts_PD,
    T,
    D,
    scale,
    threshold,
    STEPS: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_D + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    weight_part = tl.zeros([R, BLOCK], tl.float32)
    bias_part = tl.zeros([R, BLOCK], tl.float32)
    for step in range(STEPS):
        row = (program * STEPS + step) * R + tl.arange(0, R)
        real = (row < T)[:, None] & (column < D)[None, :]
        at = row[:, None] * D + column[None, :]
        grad = tl.load(grad_TD + at, mask=real, other=0.0).to(tl.float32)
        x = tl.load(sum_TD + at, mask=real, other=0.0).to(tl.float32)
        mean = tl.load(mean_T + row, mask=row < T, other=0.0)
        rstd = tl.load(rstd_T + row, mask=row < T, other=0.0)
        normal = (x - mean[:, None]) * rstd[:, None]
        scaled = grad * weight
        along = tl.sum(scaled * normal, axis=1) / D
        sum_grad = (scaled - (tl.sum(scaled, axis=1) / D)[:, None] - normal * along[:, None]) * rstd[:, None]
        if residual_grad_TD is not None:
            tl.store(residual_grad_TD + at, sum_grad, mask=real)
        if hidden_grad_TD is not None:
            if seed is not None:
                sum_grad = tl.where(_kept(seed, row, threshold, R, BLOCK), sum_grad * scale, 0.0)
            tl.store(hidden_grad_TD + at, sum_grad, mask=real)
        weight_part += grad * normal
        bias_part += grad
    if weight_parts_PD is not None:
        tl.store(weight_parts_PD + program * D + column, tl.sum(weight_part, axis=0), mask=column < D)
    if bias_parts_PD is not None:
        tl.store(bias_parts_PD + program * D + column, tl.sum(bias_part, axis=0), mask=column < D)
