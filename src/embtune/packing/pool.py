"""Pooling of a flat row without asking the device for anything, which recorded and replayed work cannot do."""

import torch
from torch import Tensor

POOLING_MODES = ("cls", "lasttoken", "mean", "mean_sqrt_len_tokens", "max")
"""The modes that `pool` knows, by sentence-transformers' names."""


def pool(states_TC: Tensor, cu_seqlens: Tensor, text_of_token: Tensor, mode: str) -> Tensor:
    """One vector [C] for each of N texts: [N, C] in float32.

    Args:
        states_TC: token states of the row.
        cu_seqlens: [N + 1] int32; no text is empty.
        text_of_token: [T] int64.
        mode: one of `POOLING_MODES`.
    """
    states_TC = states_TC.float()
    if mode == "cls":
        return states_TC.index_select(0, cu_seqlens[:-1])
    if mode == "lasttoken":
        return states_TC.index_select(0, cu_seqlens[1:] - 1)
    shape = (cu_seqlens.shape[0] - 1, states_TC.shape[1])
    if mode == "max":
        index = text_of_token[:, None].expand_as(states_TC)
        return states_TC.new_full(shape, -torch.inf).scatter_reduce(0, index, states_TC, reduce="amax")
    lengths = cu_seqlens.diff().to(states_TC.dtype)[:, None]
    total = states_TC.new_zeros(shape).index_add(0, text_of_token, states_TC)
    return total / (lengths if mode == "mean" else lengths.sqrt())
