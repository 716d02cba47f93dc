# mypy: disallow-untyped-defs=False
"""Triton kernels of `norm_rotate`: a program takes HEADS heads of R tokens, both halves [R · HEADS, BLOCK].

T tokens, P rows of cosines, H heads, D = 2 · HALF numbers a head. A head's numbers follow one another; tokens and heads
lie as far apart as the strides say. Needs triton.
"""

import triton
import triton.language as tl


@triton.jit
def _scales(weight_D, column, UNIT_OFFSET: tl.constexpr, HALF: tl.constexpr):
    left = tl.load(weight_D + column, mask=column < HALF, other=0.0).to(tl.float32)
    right = tl.load(weight_D + column + HALF, mask=column < HALF, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        left += 1.0
        right += 1.0
    return left, right


@triton.jit
def _normal(x_THD, at, real, eps, HALF: tl.constexpr):
    left = tl.load(x_THD + at, mask=real, other=0.0).to(tl.float32)
    right = tl.load(x_THD + at + HALF, mask=real, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(left * left + right * right, axis=1) / (2 * HALF) + eps)[:, None]
    return left * rstd, right * rstd, rstd


@triton.jit
def _turn(cos_PD, sin_PD, angle, column, real, HALF: tl.constexpr):
    at = angle[:, None] * (2 * HALF) + column
    cos = tl.load(cos_PD + at, mask=real, other=0.0).to(tl.float32)
    return cos, tl.load(sin_PD + at, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _place(P, block, BLOCKS: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr):
    row = tl.arange(0, R * HEADS)
    token = tl.program_id(0) // BLOCKS * R + row // HEADS
    # 64 bits: a long row of tokens times its columns passes 2**31. Their remainders would take far longer.
    return token.to(tl.int64), (token % P).to(tl.int64), block * HEADS + row % HEADS


@triton.jit
def _forward(
    x_THD,
    weight_D,
    out_THD,
    cos_PD,
    sin_PD,
    T,
    P,
    block,
    x_token,
    x_head,
    out_token,
    out_head,
    eps,
    UNIT_OFFSET: tl.constexpr,
    BLOCKS: tl.constexpr,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, angle, head = _place(P, block, BLOCKS, HEADS, R)
    column = tl.arange(0, BLOCK)[None, :]
    real = (token < T)[:, None] & (column < HALF)
    left, right, _ = _normal(x_THD, (token * x_token + head * x_head)[:, None] + column, real, eps, HALF)
    left_scale, right_scale = _scales(weight_D, column, UNIT_OFFSET, HALF)
    left *= left_scale
    right *= right_scale
    cos, sin = _turn(cos_PD, sin_PD, angle, column, real, HALF)
    out = (token * out_token + head * out_head)[:, None] + column
    tl.store(out_THD + out, left * cos - right * sin, mask=real)
    tl.store(out_THD + out + HALF, right * cos + left * sin, mask=real)


@triton.jit(do_not_specialize=["T", "P"])
def norm_rotate_forward(
    q_THD,
    k_TGD,
    q_weight_D,
    k_weight_D,
    q_out_THD,
    k_out_TGD,
    cos_PD,
    sin_PD,
    T,
    P,
    q_token,
    q_head,
    q_out_token,
    q_out_head,
    k_token,
    k_head,
    k_out_token,
    k_out_head,
    eps,
    UNIT_OFFSET: tl.constexpr,
    Q_BLOCKS: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Heads first: programs at work together then read whole rows of memory, and the same cosines.
    block = tl.program_id(0) % (Q_BLOCKS + K_BLOCKS)
    if block < Q_BLOCKS:
        _forward(
            q_THD, q_weight_D, q_out_THD, cos_PD, sin_PD, T, P, block,
            q_token, q_head, q_out_token, q_out_head, eps,
            UNIT_OFFSET, Q_BLOCKS + K_BLOCKS, HEADS, R, HALF, BLOCK,
        )  # fmt: skip
    else:
        _forward(
            k_TGD, k_weight_D, k_out_TGD, cos_PD, sin_PD, T, P, block - Q_BLOCKS,
            k_token, k_head, k_out_token, k_out_head, eps,
            UNIT_OFFSET, Q_BLOCKS + K_BLOCKS, HEADS, R, HALF, BLOCK,
        )  # fmt: skip


@triton.jit
def _backward(
    grad_THD,
    x_THD,
    weight_D,
    x_grad_THD,
    parts,
    cos_PD,
    sin_PD,
    T,
    P,
    block,
    grad_token,
    grad_head,
    x_token,
    x_head,
    x_grad_token,
    x_grad_head,
    eps,
    UNIT_OFFSET: tl.constexpr,
    BLOCKS: tl.constexpr,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, angle, head = _place(P, block, BLOCKS, HEADS, R)
    column = tl.arange(0, BLOCK)[None, :]
    real = (token < T)[:, None] & (column < HALF)
    cos, sin = _turn(cos_PD, sin_PD, angle, column, real, HALF)
    at = (token * grad_token + head * grad_head)[:, None] + column
    turned_left = tl.load(grad_THD + at, mask=real, other=0.0).to(tl.float32)
    turned_right = tl.load(grad_THD + at + HALF, mask=real, other=0.0).to(tl.float32)
    left_grad = turned_left * cos + turned_right * sin
    right_grad = turned_right * cos - turned_left * sin
    left, right, rstd = _normal(x_THD, (token * x_token + head * x_head)[:, None] + column, real, eps, HALF)
    if parts is not None:
        place = parts + tl.program_id(0).to(tl.int64) * (2 * HALF) + tl.arange(0, BLOCK)
        tl.store(place, tl.sum(left_grad * left, axis=0), mask=tl.arange(0, BLOCK) < HALF)
        tl.store(place + HALF, tl.sum(right_grad * right, axis=0), mask=tl.arange(0, BLOCK) < HALF)
    left_scale, right_scale = _scales(weight_D, column, UNIT_OFFSET, HALF)
    left_grad *= left_scale
    right_grad *= right_scale
    along = (tl.sum(left_grad * left + right_grad * right, axis=1) / (2 * HALF))[:, None]
    out = (token * x_grad_token + head * x_grad_head)[:, None] + column
    tl.store(x_grad_THD + out, (left_grad - left * along) * rstd, mask=real)
    tl.store(x_grad_THD + out + HALF, (right_grad - right * along) * rstd, mask=real)


@triton.jit(do_not_specialize=["T", "P"])
def norm_rotate_backward(
    q_out_grad_THD,
    k_out_grad_TGD,
    q_THD,
    k_TGD,
    q_weight_D,
    k_weight_D,
    q_grad_THD,
    k_grad_TGD,
    parts,
    cos_PD,
    sin_PD,
    T,
    P,
    q_out_grad_token,
    q_out_grad_head,
    q_token,
    q_head,
    q_grad_token,
    q_grad_head,
    k_out_grad_token,
    k_out_grad_head,
    k_token,
    k_head,
    k_grad_token,
    k_grad_head,
    eps,
    UNIT_OFFSET: tl.constexpr,
    Q_BLOCKS: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # `parts` [programs, D]: what each program adds to the gradient of its weight.
    block = tl.program_id(0) % (Q_BLOCKS + K_BLOCKS)
    if block < Q_BLOCKS:
        _backward(
            q_out_grad_THD, q_THD, q_weight_D, q_grad_THD, parts, cos_PD, sin_PD, T, P, block,
            q_out_grad_token, q_out_grad_head, q_token, q_head, q_grad_token, q_grad_head, eps,
            UNIT_OFFSET, Q_BLOCKS + K_BLOCKS, HEADS, R, HALF, BLOCK,
        )  # fmt: skip
    else:
        _backward(
            k_out_grad_TGD, k_TGD, k_weight_D, k_grad_TGD, parts, cos_PD, sin_PD, T, P, block - Q_BLOCKS,
            k_out_grad_token, k_out_grad_head, k_token, k_head, k_grad_token, k_grad_head, eps,
            UNIT_OFFSET, Q_BLOCKS + K_BLOCKS, HEADS, R, HALF, BLOCK,
        )  # fmt: skip
