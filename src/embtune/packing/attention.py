"""Attention over a packed row, registered with transformers under embtune's own name; no class of it is touched.

Shapes: H heads, T tokens, D numbers a head, S slots of the padded groups.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from embtune.packing.layout import PackedMask, Packing

ATTENTION = "embtune_packed"
"""The name to give to `set_attn_implementation`."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: a packed row by its packing, anything else as SDPA does it.

    Args:
        query: [1, H, T, D]; key and value may have fewer heads.
        attention_mask: a `PackedMask`, or whatever a padded batch brings.

    Returns:
        [1, T, H, D], and no weights.
    """
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    if not isinstance(attention_mask, PackedMask):
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            sliding_window=sliding_window,
            **others,
        )
    packing = attention_mask.packing
    dropout = dropout if module.training else 0.0
    # transformers hands out [1, H, T, D] views of [1, T, H, D].
    q_THD, k_THD, v_THD = (states[0].transpose(0, 1) for states in (query, key, value))
    attend = attend_flash if uses_flash(q_THD) else attend_groups
    out_THD = attend(q_THD, k_THD, v_THD, packing, dropout, scaling, causal, sliding_window)
    return out_THD.unsqueeze(0), None


def uses_flash(q_THD: Tensor) -> bool:
    """Whether PyTorch's own FlashAttention-2 takes these states: half precision on CUDA ≥ 8.0, heads up to 256."""
    if q_THD.device.type != "cuda" or q_THD.dtype not in (torch.float16, torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(q_THD.device) >= (8, 0) and q_THD.shape[-1] <= 256


def attend_flash(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    packing: Packing,
    dropout: float,
    scaling: float | None,
    causal: bool,
    window: int | None,
) -> Tensor:
    """Variable-length FlashAttention-2 through the operator under PyTorch's SDPA, which also takes dropout.

    `torch.nn.attention.varlen` calls the same kernel but fixes dropout at 0.
    """
    reach = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0 if causal else window - 1}
    return torch.ops.aten._flash_attention_forward(
        q_THD,
        k_THD,
        v_THD,
        packing.cu_seqlens,
        packing.cu_seqlens,
        packing.max_length,
        packing.max_length,
        dropout,
        causal,
        False,
        scale=scaling,
        **reach,
    )[0]


def attend_groups(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    packing: Packing,
    dropout: float,
    scaling: float | None,
    causal: bool,
    window: int | None,
    bias_HLL: Tensor | None = None,
) -> Tensor:
    """SDPA over groups of texts of similar length: every device, any dtype; `bias_HLL` is added to the scores.

    Args:
        bias_HLL: [H, L, L] for the longest text; shorter groups use its first rows and columns.
    """
    slot_of_token = packing.slot_of_token
    empty_SHD = q_THD.new_zeros(packing.slots, *q_THD.shape[1:])
    q_SHD, k_SHD, v_SHD = (
        empty_SHD[:, : states.shape[1]].index_copy(0, slot_of_token, states) for states in (q_THD, k_THD, v_THD)
    )
    grouped = q_THD.shape[1] != k_THD.shape[1]
    parts = []
    for index, group in enumerate(packing.groups):
        span = slice(group.start, group.start + group.count * group.length)
        shape = (group.count, group.length)
        q, k, v = (states[span].unflatten(0, shape).transpose(1, 2) for states in (q_SHD, k_SHD, v_SHD))
        mask = packing.allowed(index, window, causal)
        if bias_HLL is not None:
            bias = bias_HLL[None, :, : group.length, : group.length]
            mask = bias if mask is None else bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scaling, enable_gqa=grouped)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return take(torch.cat(parts), slot_of_token)


def take(states: Tensor, index: Tensor) -> Tensor:
    """Rows of `states` in the order of `index`, in which no row stands twice."""
    return _Take.apply(states, index)


class _Take(torch.autograd.Function):
    """Rows of `states` at an index without repeats; its gradient is a copy, where PyTorch's own would scatter-add."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = states.shape[0]
        return states.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        zeros = gradient.new_zeros(ctx.rows, *gradient.shape[1:])
        return zeros.index_copy_(0, index, gradient), None


def register() -> None:
    """Make the name known to transformers; models take it up only when asked. Calling it again changes nothing."""
    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
