"""The plain PyTorch twin of `row_attention`: the whole table of scores [H, T, T], in the dtype of its inputs."""

import torch
from torch import Tensor

_BITS = 0xFFFFFFFF


def plain_row_attention(
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
    """What `row_attention` computes, out of PyTorch's own functions; its gradients are autograd's. Float64 too.

    Args and result are those of `row_attention`, the dropped weights included.
    """
    tokens, heads, head_dim = q_THD.shape
    k_THD, v_THD = (states.repeat_interleave(heads // states.shape[1], 1) for states in (k_TGD, v_TGD))
    scores = torch.einsum("qhd,khd->hqk", q_THD, k_THD) * (head_dim**-0.5 if scale is None else scale)
    place = torch.arange(tokens, device=q_THD.device)
    distance = place[None, :] - place[:, None]
    if bias_HR is not None:
        distances = bias_HR.shape[1]
        scores = scores + bias_HR[:, (distance + distances // 2).clamp(0, distances - 1)]
    readable = (place >= starts_T[:, None]) & (place < ends_T[:, None])
    before, after = window[0], 0 if causal else window[1]
    if before >= 0:
        readable &= distance >= -before
    if after >= 0:
        readable &= distance <= after
    weights = scores.masked_fill(~readable, float("-inf")).softmax(-1)
    if seed is not None and dropout > 0:
        weights = torch.where(kept_weights(seed, heads, tokens, dropout), weights / (1 - dropout), 0.0)
    return torch.einsum("hqk,khd->qhd", weights, v_THD)


def kept_weights(seed: Tensor, heads: int, tokens: int, dropout: float) -> Tensor:
    """Which attention weights dropout leaves, [H, T, T] bool: the numbers that the kernels draw from `seed`, int64 [1].

    Each query and each key of a head has a hash; their sum, scrambled once more, is the pair's number.
    """
    index = torch.arange(tokens, device=seed.device)
    head = torch.arange(heads, device=seed.device)[:, None]
    query_key = _scramble((seed & _BITS) + _scramble((seed >> 32) + _scramble(head + 1)))
    query_HT = _line(query_key, index)
    key_HT = _line(_scramble(query_key + 0x9E3779B9), index)
    bits = (query_HT[:, :, None] + key_HT[:, None, :]) & _BITS
    bits = ((bits ^ (bits >> 16)) * 0x2C1B3C6D) & _BITS
    # The kernels compare signed numbers.
    signed = bits - ((bits >> 31) << 32)
    return signed >= dropout_threshold(dropout)


def dropout_threshold(dropout: float) -> int:
    """The least int32 of all that are kept when a share `dropout` of all int32 is not."""
    return min(round(dropout * 2**32) - 2**31, 2**31 - 1)


# Numbers of 32 bits in int64: a product's low half is right whatever overflows.
def _scramble(number: Tensor) -> Tensor:
    number = number & _BITS
    number = ((number ^ (number >> 16)) * 0x85EBCA6B) & _BITS
    number = ((number ^ (number >> 13)) * 0xC2B2AE35) & _BITS
    return number ^ (number >> 16)


def _line(key: Tensor, index: Tensor) -> Tensor:
    index = ((key + index) * 0x85EBCA6B) & _BITS
    return ((index ^ (index >> 13)) * 0xC2B2AE35) & _BITS
