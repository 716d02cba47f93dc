# mypy: disallow-untyped-defs=False
"""Triton kernel of `rotate`: a program turns HEADS heads of R tokens, both halves [R · HEADS, BLOCK]. Needs triton.

T tokens, P rows of cosines, H heads, D = 2 · HALF numbers a head. A head's numbers follow one another; tokens and heads
lie as far apart as the strides say.
"""

import triton
import triton.language as tl


@triton.jit
def _turn(
    x_THD,
    out_THD,
    x_token,
    x_head,
    out_token,
    out_head,
    cos_PD,
    sin_PD,
    token,
    head,
    angle,
    T,
    INVERSE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)[None, :]
    real = (token < T)[:, None] & (column < HALF)
    at = (token * x_token + head * x_head)[:, None] + column
    left = tl.load(x_THD + at, mask=real, other=0.0).to(tl.float32)
    right = tl.load(x_THD + at + HALF, mask=real, other=0.0).to(tl.float32)
    turn = (angle * (2 * HALF))[:, None] + column
    cos = tl.load(cos_PD + turn, mask=real, other=0.0).to(tl.float32)
    sin = tl.load(sin_PD + turn, mask=real, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    place = (token * out_token + head * out_head)[:, None] + column
    tl.store(out_THD + place, left * cos - right * sin, mask=real)
    tl.store(out_THD + place + HALF, right * cos + left * sin, mask=real)


@triton.jit
def _copy(
    x_THD, out_THD, x_token, x_head, out_token, out_head, token, head, T, HALF: tl.constexpr, BLOCK: tl.constexpr
):
    column = tl.arange(0, BLOCK)[None, :]
    real = (token < T)[:, None] & (column < HALF)
    at = (token * x_token + head * x_head)[:, None] + column
    place = (token * out_token + head * out_head)[:, None] + column
    tl.store(out_THD + place, tl.load(x_THD + at, mask=real), mask=real)
    tl.store(out_THD + place + HALF, tl.load(x_THD + at + HALF, mask=real), mask=real)


@triton.jit(do_not_specialize=["T", "P"])
def rotate_heads(
    q_THD,
    k_THD,
    v_THD,
    q_out_THD,
    k_out_THD,
    v_out_THD,
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
    v_token,
    v_head,
    v_out_token,
    v_out_head,
    INVERSE: tl.constexpr,
    Q_BLOCKS: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Heads first: programs at work together then read whole rows of memory, and the same cosines.
    block = tl.program_id(0) % BLOCKS
    row = tl.arange(0, R * HEADS)
    token = tl.program_id(0) // BLOCKS * R + row // HEADS
    # 64 bits: a long row of tokens times its columns passes 2**31. Their remainders would take far longer.
    angle = (token % P).to(tl.int64)
    token = token.to(tl.int64)
    head = row % HEADS
    if block < Q_BLOCKS:
        head += block * HEADS
        _turn(
            q_THD, q_out_THD, q_token, q_head, q_out_token, q_out_head,
            cos_PD, sin_PD, token, head, angle, T, INVERSE, HALF, BLOCK,
        )  # fmt: skip
    elif block < Q_BLOCKS + K_BLOCKS:
        head += (block - Q_BLOCKS) * HEADS
        _turn(
            k_THD, k_out_THD, k_token, k_head, k_out_token, k_out_head,
            cos_PD, sin_PD, token, head, angle, T, INVERSE, HALF, BLOCK,
        )  # fmt: skip
    elif v_THD is not None:
        head += (block - Q_BLOCKS - K_BLOCKS) * HEADS
        _copy(v_THD, v_out_THD, v_token, v_head, v_out_token, v_out_head, token, head, T, HALF, BLOCK)
