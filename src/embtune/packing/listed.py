"""Texts whose token ids stay on the host as lists: `encode` lays them end to end, and only then moves them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embtune.packing.row import PackedRow

# Padding stays as sentence-transformers asks for it: the tokenizer remembers what it was told last, and another thread
# that asks for padded texts would get them without, or give these some.
LISTED: dict[str, dict[str, Any]] = {
    "text": {"return_attention_mask": True, "return_token_type_ids": False},
    "common": {"return_tensors": None},
}
"""The `processing_kwargs` with which `preprocess` gives lists of token ids and of what is no padding among them."""


def is_listed(features: Mapping[str, Any]) -> bool:
    """Whether features are what `preprocess` makes with `LISTED`."""
    return isinstance(features.get("input_ids"), list)


def lay_out(features: Mapping[str, Any], padding_id: int | None, token_types: bool) -> PackedRow | None:
    """Listed features as one row on the host; None if a text has no token.

    Args:
        padding_id: as `flatten` takes it.
        token_types: whether the model takes `token_type_ids`, which are 0 for texts that are no pairs.
    """
    texts = []
    for ids, real in zip(features["input_ids"], features["attention_mask"], strict=True):
        if 1 not in real:
            return None
        first = real.index(1)
        texts.append(np.array(ids[first : first + sum(real)], np.int64))
    others = {name: value for name, value in features.items() if name not in ("input_ids", "attention_mask")}
    return PackedRow.of([texts], padding_id, token_types, others)


def as_tensors(features: Mapping[str, Any], device: torch.device) -> dict[str, Tensor | Any]:
    """Listed features as the padded ones that `preprocess` makes by itself."""
    names = ("input_ids", "attention_mask")
    return {**features, **{name: torch.tensor(features[name], dtype=torch.int64, device=device) for name in names}}
