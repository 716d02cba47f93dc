"""Texts that are tokenised without ever being padded: `encode` lays their ids end to end as they come."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from embtune.packing.row import PackedRow

UNPADDED: dict[str, dict[str, Any]] = {
    "text": {"padding": False, "return_attention_mask": False, "return_token_type_ids": False},
    "common": {"return_tensors": None},
}
"""The `processing_kwargs` with which `preprocess` gives a list of token ids for each text."""


def is_ragged(features: Mapping[str, Any]) -> bool:
    """Whether features are what `preprocess` makes with `UNPADDED`."""
    return isinstance(features.get("input_ids"), list)


def lay_out(features: Mapping[str, Any], padding_id: int | None, token_types: bool) -> PackedRow | None:
    """Ragged features as one row on the host; None if a text has no token.

    Args:
        padding_id: as `flatten` takes it.
        token_types: whether the model takes `token_type_ids`, which are 0 for texts that are no pairs.
    """
    if not all(features["input_ids"]):
        return None
    others = {name: value for name, value in features.items() if name != "input_ids"}
    texts = [np.array(ids, np.int64) for ids in features["input_ids"]]
    return PackedRow.of([texts], padding_id, token_types, others)
