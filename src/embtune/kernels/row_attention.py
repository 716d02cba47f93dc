"""Attention over a flat row of texts that stand end to end, made for texts of tens to hundreds of tokens, on Triton.

FlashAttention's tiles hold 128 tokens of one text each, so that a text of 15 leaves most of a tile empty. A tile here
holds tokens that follow each other in the row, whichever texts they belong to. The grid depends on the number of tokens
alone, so a CUDA graph replays it for any texts that fill the same row.

T tokens, H query heads, G key and value heads, D numbers a head, R distances of the bias.
"""

from typing import Any

import torch
from torch import Tensor

from embtune.errors import ArgumentError
from embtune.kernels.row_attention_launch import RowAttention, choose_tiles
from embtune.runtime import require_triton

MAX_HEAD_DIM = 256
"""The largest head that a tile holds."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def text_bounds(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Where the text of each token begins and ends, both int32 [T]; does not wait for the device.

    Args:
        cu_seqlens: int32 [N + 1], from 0 to `tokens`: text i is the tokens `cu_seqlens[i] : cu_seqlens[i + 1]`.
        tokens: T, so that nobody has to ask the device for it.
    """
    place = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    after = torch.searchsorted(cu_seqlens, place, right=True)
    return cu_seqlens[after - 1], cu_seqlens[after]


def row_attention(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    starts_T: Tensor,
    ends_T: Tensor,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    bias_HR: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + bias) v within each text of a flat row (online softmax: Milakov and Gimelshein 2018).

    Products of half-precision inputs are summed in float32, everything between them is float32. Kept for the backward
    pass: the inputs, the output and a float32 for each query and head; it computes the weights again from them, as
    FlashAttention-2 does (Dao 2023), and the gradient of the bias by atomic additions, in no fixed order. Texts share
    tiles, in which others weigh zero: what is not finite in one may reach its neighbours.

    Args:
        q_THD: queries, float32, bfloat16 or float16.
        k_TGD: keys of the same dtype; each serves H / G query heads that stand side by side.
        v_TGD: values, shaped as the keys.
        starts_T: int32, where the text of each token begins (`text_bounds`).
        ends_T: int32, the token after its last.
        scale: of the scores; None for 1 / √D.
        causal: whether a token reads none after itself, whatever the window says.
        window: how many tokens before and after itself a token reads, -1 for all.
        bias_HR: float32, R odd: column R // 2 + key - query is added to a score; past the ends, the last column there.
        dropout: share of the weights that is dropped; what is kept is divided by 1 - dropout.
        seed: int64 [1] on the device: the same seed drops the same weights. Read by the kernels themselves, so that a
            CUDA graph which also records how the seed is drawn drops other weights with each replay.

    Returns:
        [T, H, D], contiguous, in the dtype of the queries.

    Raises:
        ArgumentError: shapes, dtypes or settings that do not fit, or a device where Triton does not run.
        MissingPackageError: triton is not installed.
    """
    _check(q_THD, k_TGD, v_TGD, starts_T, ends_T, window, bias_HR, dropout, seed)
    scale = q_THD.shape[2] ** -0.5 if scale is None else scale
    before, after = window[0], 0 if causal else window[1]
    if dropout == 0:
        seed = None
    return _attend(q_THD, k_TGD, v_TGD, starts_T, ends_T, bias_HR, seed, scale, before, after, dropout)[0]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    ends: Tensor,
    window: tuple[int, int],
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]):
        raise ArgumentError(f"{shapes}: expected q [T, H, D], k and v [T, G, D].")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ArgumentError(f"{shapes}: {q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly.")
    if q.shape[2] > MAX_HEAD_DIM:
        raise ArgumentError(f"{shapes}: a head holds at most {MAX_HEAD_DIM} numbers; use PyTorch's own attention.")
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ArgumentError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}: expected one of float32, bfloat16 and float16.")
    if any(part is not None and part.device != q.device for part in (k, v, starts, ends, bias, seed)):
        raise ArgumentError(f"q is on {q.device}: keys, values, starts, ends, bias and seed must be there too.")
    for name, bound in (("starts", starts), ("ends", ends)):
        if bound.shape != q.shape[:1] or bound.dtype != torch.int32:
            raise ArgumentError(f"{name} is {bound.dtype} {tuple(bound.shape)}: expected int32 [{q.shape[0]}].")
    if min(window) < -1:
        raise ArgumentError(f"window={window}: expected how many tokens before and after are read, or -1 for all.")
    if bias is not None and (bias.ndim != 2 or bias.shape[0] != q.shape[1] or bias.shape[1] % 2 == 0):
        raise ArgumentError(f"bias {tuple(bias.shape)}: expected [{q.shape[1]}, R] with an odd number R of distances.")
    if bias is not None and bias.dtype != torch.float32:
        raise ArgumentError(f"bias is {bias.dtype}: expected float32.")
    if not 0 <= dropout < 1:
        raise ArgumentError(f"dropout={dropout}: the share of dropped weights must be at least 0 and below 1.")
    if dropout > 0 and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
        raise ArgumentError(f"dropout={dropout} needs a seed: an int64 tensor of one element on {q.device}.")


# Operators of PyTorch's own kind: compiled code takes them whole, without looking inside.
@torch.library.custom_op("embtune::row_attention", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    ends: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    before: int,
    after: int,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    row = _row(q, k, v, starts, ends, bias, seed, scale, before, after, dropout)
    out, lse = _outputs(q)
    row.attend(out, lse)
    return out, lse


@torch.library.custom_op("embtune::row_attention_backward", mutates_args=())
def _attend_backward(
    out_grad: Tensor,
    out: Tensor,
    lse: Tensor,
    with_bias: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    ends: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    before: int,
    after: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row = _row(q, k, v, starts, ends, bias, seed, scale, before, after, dropout)
    q_grad, k_grad, v_grad, bias_grad = _gradients(out_grad, out, lse, with_bias, q, k, v, starts, ends, bias)
    out_grad, delta = _packed(out_grad), torch.empty_like(lse)
    row.query_gradients(out, out_grad, lse, delta, q_grad, bias_grad.zero_() if with_bias else None)
    row.key_value_gradients(out_grad, lse, delta, k_grad, v_grad)
    return q_grad, k_grad, v_grad, bias_grad


def _row(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, bias: Tensor | None, *others: Any
) -> RowAttention:
    require_triton(q.device, "row_attention")
    bounds = starts.contiguous(), ends.contiguous()
    bias = bias if bias is None else bias.contiguous()
    tiles = choose_tiles(q.shape[2], q.dtype)
    return RowAttention(tiles, _packed(q), _packed(k), _packed(v), *bounds, bias, *others)


def _packed(states: Tensor) -> Tensor:
    return states if states.stride(-1) == 1 else states.contiguous()


@_attend.register_fake
def _outputs(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@_attend_backward.register_fake
def _gradients(
    _grad: Tensor, _out: Tensor, _lse: Tensor, with_bias: bool, q: Tensor, k: Tensor, v: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # An operator cannot return None: without a gradient of the bias, an empty tensor takes its place.
    # Contiguous, as the kernel writes it: the bias may be a view of another order.
    bias_grad = others[2].new_empty(others[2].shape) if with_bias else q.new_empty(0)
    return *(states.new_empty(states.shape) for states in (q, k, v)), bias_grad


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(out, lse, *inputs[:7])
    ctx.settings = inputs[7:]


def _backward(ctx: Any, out_grad: Tensor, _lse_grad: None) -> tuple[Tensor | None, ...]:
    out, lse, *inputs = ctx.saved_tensors
    with_bias = ctx.needs_input_grad[5]
    *grads, bias_grad = _attend_backward(out_grad, out, lse, with_bias, *inputs, *ctx.settings)
    return *grads, None, None, bias_grad if with_bias else None, None, None, None, None, None


_attend.register_autograd(_backward, setup_context=_keep)

ROW_ATTENTION = torch.ops.embtune.row_attention.default
"""The operator of the forward pass, by which those that watch what PyTorch computes know it."""
