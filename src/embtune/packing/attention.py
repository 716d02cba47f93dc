"""Attention over a packed row, registered with transformers under embtune's own name; no class of it is touched.

Shapes: H heads, T tokens, D numbers a head, S slots of the padded groups.
"""

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from embtune.kernels.row_attention import row_attention
from embtune.packing.layout import WINDOWS_MASK_STEP, PackedMask, Packing, RowAttention
from embtune.runtime import runs_triton

ATTENTION = "embtune_packed"
"""The name to give to `set_attn_implementation`."""

FLASH_HEAD_DIM = 256
"""The largest head that FlashAttention-2 takes."""

TILES_LENGTH = 512
"""Rows whose texts are no longer go to `row_attention`; FlashAttention's larger tiles are faster from there on."""

NARROW_WINDOW = 128
"""Layers in which a token reads no farther than this go to `row_attention` in any row.

ModernBERT's, 65, at texts of up to 1,024 tokens: see docs/decisions.md.
"""

NARROW_HEAD_DIM = 128
"""The largest head for which that was measured."""

_FLASH_DTYPES = (torch.float16, torch.bfloat16)


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
        attention_mask: that of a row (`row_mask`), or whatever a padded batch brings.

    Returns:
        [1, T, H, D], and no weights.
    """
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    packed = isinstance(attention_mask, PackedMask)
    if attention_mask is None or not (packed or attention_mask.dtype == torch.int32):
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
    dropout = dropout if module.training else 0.0
    # transformers hands out [1, H, T, D] views of [1, T, H, D].
    # Their gradients go back as views: an index would copy each into zeros, and into the other order again.
    q_THD, k_THD, v_THD = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    rows = q_THD, k_THD, v_THD
    settings: tuple[Any, ...] = dropout, scaling, causal, sliding_window
    half = q_THD.dtype in _FLASH_DTYPES
    if is_bounds_mask(attention_mask):
        tokens, longest = len(q_THD), attention_mask.shape[2] * WINDOWS_MASK_STEP
        bounds, borders = attention_mask[..., :tokens], attention_mask[0, 0, 0, tokens:]
        narrow = sliding_window is not None and sliding_window <= NARROW_WINDOW
        if half and not narrow and len(borders) > 0:
            out_THD = attend_flash(*rows, borders, longest, *settings)
        else:
            out_THD = attend_tiles(*rows, bounds, *settings)
    elif half and not packed:
        out_THD = attend_flash(*rows, attention_mask[0, 0, 0], attention_mask.shape[2], *settings)
    else:
        out_THD = attend_groups(*rows, attention_mask, *settings)
    return out_THD.unsqueeze(0), None


def is_bounds_mask(mask: Tensor | None) -> TypeGuard[Tensor]:
    """Whether an attention mask is a `bounds_mask`, or begins with one, as a `windows_mask` does."""
    return mask is not None and mask.dtype == torch.int32 and mask.shape[0] == 2


def attend_tiles(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    bounds: Tensor,
    dropout: float,
    scaling: float | None,
    causal: bool,
    window: int | None,
    bias_HR: Tensor | None = None,
) -> Tensor:
    """`row_attention`, which fills its tiles with short texts; `bias_HR` [H, R] is added by distance.

    Args:
        bounds: a `bounds_mask`.
    """
    # Drawn on the device: nothing waits, and a CUDA graph draws anew with each replay.
    seed = torch.randint(2**31 - 1, (1,), device=q_THD.device) if dropout > 0 else None
    reach = (-1, -1) if window is None else (window - 1, window - 1)
    # Rotary embeddings computed in float32 leave queries and keys there.
    q_THD, k_THD = q_THD.to(v_THD.dtype), k_THD.to(v_THD.dtype)
    starts_T, ends_T = bounds[0, 0, 0], bounds[1, 0, 0]
    return row_attention(q_THD, k_THD, v_THD, starts_T, ends_T, scaling, causal, reach, bias_HR, dropout, seed)


def row_attention_for(
    device: torch.device,
    dtype: torch.dtype,
    longest: int,
    *,
    tiles: bool,
    flash: bool,
    windows: bool = False,
    triton: bool = True,
) -> RowAttention:
    """What computes the attention of a row on this device, in this dtype, with no text longer than `longest`.

    Args:
        tiles: whether `row_attention` computes what the architecture asks for.
        flash: the same of FlashAttention.
        windows: whether some layers have a narrow window.
        triton: whether to take `row_attention` where FlashAttention would serve as well.
    """
    flash = flash and flash_serves(device, dtype)
    half = dtype in _FLASH_DTYPES
    if tiles and half and runs_triton(device):
        if not flash or (triton and longest <= TILES_LENGTH):
            return "tiles"
        if windows and triton:
            return "windows"
    return "flash" if flash else "groups"


def flash_serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's own FlashAttention-2 takes states of this dtype there: half precision on CUDA ≥ 8.0."""
    return device.type == "cuda" and dtype in _FLASH_DTYPES and torch.cuda.get_device_capability(device) >= (8, 0)


def attend_flash(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
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
        cu_seqlens,
        cu_seqlens,
        max_length,
        max_length,
        dropout,
        causal,
        False,
        scale=scaling,
        **reach,
    )[0]


# Compiled code goes round it: traced, the groups of one batch would become constants, to be compiled anew for the next.
@torch.compiler.disable
def attend_groups(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    mask: Tensor,
    dropout: float,
    scaling: float | None,
    causal: bool,
    window: int | None,
    bias_HLL: Tensor | None = None,
) -> Tensor:
    """SDPA over groups of texts of similar length: every device, any dtype; `bias_HLL` is added to the scores.

    Args:
        mask: a `PackedMask` or a `flash_mask`.
        bias_HLL: [H, L, L] for the longest text; shorter groups use its first rows and columns.
    """
    packing = mask.packing if isinstance(mask, PackedMask) else Packing.of(mask[0, 0, 0])
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
        readable = packing.allowed(index, window, causal)
        if bias_HLL is not None:
            bias = bias_HLL[None, :, : group.length, : group.length]
            readable = bias if readable is None else bias.masked_fill(~readable, torch.finfo(bias.dtype).min)
        out = F.scaled_dot_product_attention(q, k, v, readable, dropout, scale=scaling, enable_gqa=grouped)
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
