# mypy: disallow-untyped-defs=False
"""Triton kernels of `gated`: a program computes a tile [R, BLOCK] of act(gate) · up in float32. Needs triton.

T rows, C columns. Gate and up may be halves of one matrix: their rows lie `gate_stride` and `up_stride` apart, and so
do those of their gradients; the product's rows are dense.
"""

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2_PI = tl.constexpr(0.3989422804014327)
# gelu_tanh is x · sigmoid(2 · sqrt(2 / pi) · (x + 0.044715 · x³)).
_TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _sigmoid(x):
    # The exponential of a negative number never overflows.
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 1.0) / (1.0 + small)


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr):
    # The value and the derivative; what a caller does not use is not compiled.
    if ACTIVATION == "silu":
        share = _sigmoid(x)
        slope = share * (1.0 + x * (1.0 - share))
    elif ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF))
        slope = share + x * _INV_SQRT_2_PI * tl.exp(-0.5 * x * x)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        share = _sigmoid(x * (x * x * _CUBIC + 1.0) * _TWICE_SQRT_2_OVER_PI)
        slope = share + x * share * (1.0 - share) * (x * x * (3.0 * _CUBIC) + 1.0) * _TWICE_SQRT_2_OVER_PI
    return x * share, slope


@triton.jit
def _place(T, C, R: tl.constexpr, BLOCK: tl.constexpr):
    # 64 bits: a long row of tokens times its columns passes 2**31.
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    return row, column, (row < T) & (column < C)


@triton.jit(do_not_specialize=["T"])
def gated_forward(
    gate, up, out_TC, T, C, gate_stride, up_stride, ACTIVATION: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr
):
    row, column, real = _place(T, C, R, BLOCK)
    x = tl.load(gate + row * gate_stride + column, mask=real, other=0.0).to(tl.float32)
    y = tl.load(up + row * up_stride + column, mask=real, other=0.0).to(tl.float32)
    value, _ = _activation(x, ACTIVATION)
    tl.store(out_TC + row * C + column, value * y, mask=real)


@triton.jit(do_not_specialize=["T"])
def gated_backward(
    grad_TC,
    gate,
    up,
    gate_grad,
    up_grad,
    T,
    C,
    gate_stride,
    up_stride,
    grad_stride,
    ACTIVATION: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, real = _place(T, C, R, BLOCK)
    grad = tl.load(grad_TC + row * C + column, mask=real, other=0.0).to(tl.float32)
    x = tl.load(gate + row * gate_stride + column, mask=real, other=0.0).to(tl.float32)
    y = tl.load(up + row * up_stride + column, mask=real, other=0.0).to(tl.float32)
    value, slope = _activation(x, ACTIVATION)
    tl.store(gate_grad + row * grad_stride + column, grad * y * slope, mask=real)
    tl.store(up_grad + row * grad_stride + column, grad * value, mask=real)
