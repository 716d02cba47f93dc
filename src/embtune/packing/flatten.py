"""From padded features to one flat row, as sentence-transformers' Transformer and Pooling understand it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from embtune.packing.layout import Packing, RowAttention, row_mask

# What flattening knows how to carry; a batch with anything else per token stays padded.
_PER_TOKEN = frozenset({"input_ids", "attention_mask", "token_type_ids"})

FLAT = _PER_TOKEN | {"position_ids", "cu_seq_lens_q", "seq_idx"}
"""Features that lie flat in a row and mean nothing beside padded ones."""


def can_flatten(features: Mapping[str, Any]) -> bool:
    """Whether these are padded text features that flattening knows how to carry."""
    mask = features.get("attention_mask")
    ids = features.get("input_ids")
    if not isinstance(mask, Tensor) or not isinstance(ids, Tensor) or mask.shape != ids.shape or mask.ndim != 2:
        return False
    unknown = [
        key
        for key, value in features.items()
        if isinstance(value, Tensor) and value.shape == ids.shape and key not in _PER_TOKEN
    ]
    # Losses over all layers (AdaptiveLayer, Matryoshka2d) come a second time with the states of the first pass, which
    # are padded again by then.
    return not unknown and not {"inputs_embeds", "all_layer_embeddings"} & features.keys()


def flatten(
    features: Mapping[str, Any],
    dtype: torch.dtype,
    padding_id: int | None = None,
    mask_value: float = 0,
    attention: RowAttention = "groups",
) -> tuple[dict[str, Any], Packing] | None:
    """Turn padded features [N, L] into those of one row [1, T] of real tokens; None if a text has no token at all.

    On an accelerator this waits for it once, to read the mask: everything else is laid out on the CPU.

    Args:
        features: with `input_ids` and `attention_mask`; padding may stand on either side.
        dtype: of the backbone.
        padding_id: for families that count positions from it (RoBERTa, MPNet), skipping a literal padding token inside
            a text as the model itself does; None where positions count from 0.
        mask_value: 1 for models that multiply embeddings by their mask.
        attention: what will compute the row's attention.

    Returns:
        The features with `position_ids`, `cu_seq_lens_q`, `seq_idx` and, as attention mask, what that
        attention reads (`row_mask`); and the packing.
    """
    ids = features["input_ids"]
    real = features["attention_mask"].cpu().bool()
    lengths = real.sum(dim=1).tolist()
    if min(lengths) == 0:
        return None
    place = real.flatten().nonzero()[:, 0].to(ids.device, non_blocking=True)
    packing = Packing(lengths, ids.device, place)
    if padding_id is None:
        positions = (real.cumsum(dim=1) - 1)[real].to(ids.device, non_blocking=True)
    else:
        counted = (ids != padding_id) & features["attention_mask"].bool()
        positions = (counted.cumsum(dim=1) * counted + padding_id).flatten().index_select(0, place)
    row: dict[str, Any] = {key: value for key, value in features.items() if key not in _PER_TOKEN}
    for key in ("input_ids", "token_type_ids"):
        if key in features:
            row[key] = features[key].flatten().index_select(0, place).unsqueeze(0)
    row["position_ids"] = positions.unsqueeze(0)
    row["attention_mask"] = row_mask(packing, dtype, mask_value, attention)
    row["cu_seq_lens_q"] = packing.cu_seqlens
    row["seq_idx"] = packing.text_of_token.unsqueeze(0)
    return row, packing


def unflatten(states_1TC: Tensor, packing: Packing, shape: torch.Size) -> Tensor:
    """Token states of a packed row [1, T, …] back in a padded batch of `shape` [N, L], zeros elsewhere."""
    padded = states_1TC.new_zeros(shape.numel(), *states_1TC.shape[2:])
    return padded.index_copy(0, packing.place, states_1TC[0]).unflatten(0, shape)
