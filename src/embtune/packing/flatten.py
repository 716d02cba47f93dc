"""From padded features to one flat row, as sentence-transformers' Transformer and Pooling understand it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from embtune.packing.layout import PackedMask, Packing

# What flattening knows how to carry; a batch with anything else per token stays padded.
_PER_TOKEN = frozenset({"input_ids", "attention_mask", "token_type_ids"})

ROW_ONLY = frozenset({"position_ids", "cu_seq_lens_q", "seq_idx"})
"""Features that describe a flat row and mean nothing beside padded ones."""


def can_flatten(features: Mapping[str, Any]) -> bool:
    """Whether these are padded text features whose texts all have at least one token."""
    mask = features.get("attention_mask")
    ids = features.get("input_ids")
    if not isinstance(mask, Tensor) or not isinstance(ids, Tensor) or mask.shape != ids.shape or mask.ndim != 2:
        return False
    unknown = [
        key
        for key, value in features.items()
        if isinstance(value, Tensor) and value.shape == ids.shape and key not in _PER_TOKEN
    ]
    return not unknown and "inputs_embeds" not in features and bool(mask.any(dim=1).all())


def flatten(
    features: Mapping[str, Any], dtype: torch.dtype, padding_id: int | None = None, mask_value: float = 0
) -> dict[str, Any]:
    """Turn padded features [N, L] into those of one row [1, T] of real tokens.

    Args:
        features: with `input_ids` and `attention_mask`; padding may stand on either side.
        dtype: of the backbone.
        padding_id: for families that count positions from it (RoBERTa, MPNet), skipping a literal padding token inside
            a text as the model itself does; None where positions count from 0.
        mask_value: 1 for models that multiply embeddings by their mask.

    Returns:
        The features with `position_ids`, `cu_seq_lens_q`, `seq_idx` and, as attention mask, a `PackedMask`.
    """
    ids, real = features["input_ids"], features["attention_mask"].bool()
    packing = Packing(real.sum(dim=1).tolist(), ids.device)
    if padding_id is None:
        positions = real.cumsum(dim=1) - 1
    else:
        counted = (ids != padding_id) & real
        positions = counted.cumsum(dim=1) * counted + padding_id
    row: dict[str, Any] = {key: value for key, value in features.items() if key not in _PER_TOKEN}
    row["input_ids"] = ids[real].unsqueeze(0)
    if "token_type_ids" in features:
        row["token_type_ids"] = features["token_type_ids"][real].unsqueeze(0)
    row["position_ids"] = positions[real].unsqueeze(0)
    row["attention_mask"] = PackedMask.of(packing, dtype, mask_value)
    row["cu_seq_lens_q"] = packing.cu_seqlens
    row["seq_idx"] = packing.text_of_token.unsqueeze(0)
    return row


def unflatten(states_1TC: Tensor, real: Tensor) -> Tensor:
    """Token states of a packed row [1, T, …] back in the places of a padded batch [N, L, …], zeros elsewhere."""
    padded = states_1TC.new_zeros(*real.shape, *states_1TC.shape[2:])
    padded[real] = states_1TC[0]
    return padded
