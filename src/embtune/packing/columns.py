"""All columns of a batch in one row: joined before the pass, split into columns again after it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embtune.packing.row import PREPARED, PackedRow

_PRECOMPUTED = "embtune_precomputed"
EMBEDDING_ONLY = "embtune_embedding_only"
"""In features: nobody will ask for token embeddings, which need not be put back into their padded places."""


def is_precomputed(features: Mapping[str, Any]) -> bool:
    """Whether these features hold an embedding that `embed_columns_once` computed."""
    return _PRECOMPUTED in features


def embed_columns_once(
    model: Callable[[dict[str, Any]], dict[str, Any]], columns: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Embed all columns in one pass; returns for each column features that the model hands back as they are.

    Columns that cannot share a pass (different prompts, tasks or kinds of features) are returned unchanged.

    Args:
        model: called once, with the padded features of all columns below each other.
        columns: padded features of each column, [N, L] with its own L.
    """
    joined = _join(columns)
    if joined is None:
        return list(columns)
    return _embedded(model, joined, [len(column["input_ids"]) for column in columns])


def embed_row_once(model: Callable[[dict[str, Any]], dict[str, Any]], row: PackedRow) -> list[dict[str, Any]]:
    """As `embed_columns_once`, for columns that were laid out as one row beforehand."""
    return _embedded(model, {PREPARED: row}, row.columns)


def _embedded(
    model: Callable[[dict[str, Any]], dict[str, Any]], features: Mapping[str, Any], counts: Sequence[int]
) -> list[dict[str, Any]]:
    embeddings = model({**features, EMBEDDING_ONLY: True})["sentence_embedding"]
    parts = embeddings.split(list(counts))
    # sentence-transformers does not pad columns together that it takes for flat rows: it calls the model for each.
    return [
        {"sentence_embedding": part, _PRECOMPUTED: True, "cu_seq_lens_q": torch.arange(len(part) + 1)} for part in parts
    ]


def _join(columns: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    first = columns[0]
    if len(columns) < 2 or any(set(column) != set(first) or "attention_mask" not in column for column in columns):
        return None
    width = max(column["input_ids"].shape[1] for column in columns)
    joined: dict[str, Any] = {}
    for key, value in first.items():
        values = [column[key] for column in columns]
        if isinstance(value, Tensor) and value.ndim == 2:
            if any(other.shape != column["input_ids"].shape for other, column in zip(values, columns, strict=True)):
                return None
            # Padding carries no attention and is gone once the row is flat, so its value and side do not matter.
            joined[key] = torch.cat([F.pad(other, (0, width - other.shape[1])) for other in values])
        elif isinstance(value, Tensor):
            if not all(torch.equal(other, value) for other in values):
                return None
            joined[key] = value
        elif any(other != value for other in values):
            return None
        else:
            joined[key] = value
    return joined
