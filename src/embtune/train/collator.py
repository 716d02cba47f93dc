"""Batches from token ids: what stands in for the rows of texts and for tokenising in the collator.

sentence-transformers' own collator still makes every batch, so that labels, prompts and names are as it makes them; it
is given token ids where it expects texts, and a function that pads them where it expects one that tokenises.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from sentence_transformers.base.data_collator import BaseDataCollator
from torch.utils.data import Dataset

from embtune.data.token_cache import TokenColumn
from embtune.packing.row import PREPARED, PackedRow

TENSORS = frozenset({"input_ids", "attention_mask", "token_type_ids"})
"""Features that can be made of token ids alone."""


class TokenRows(Dataset[dict[str, Any]]):
    """The rows of a data set, with the token ids of a text where the text was.

    Args:
        names: the cells of a row, in order.
        texts: the columns that are token ids.
        rest: the other columns, as they are.
        dataset_name: put into each row, if `names` has it.
    """

    def __init__(
        self,
        names: Sequence[str],
        texts: Mapping[str, TokenColumn],
        rest: datasets.Dataset | None,
        dataset_name: str | None,
    ) -> None:
        self._names = list(names)
        self._texts = dict(texts)
        self._rest = rest
        self._dataset_name = dataset_name

    def __len__(self) -> int:
        return len(next(iter(self._texts.values())))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row [rows], all its texts together."""
        return np.sum([column.lengths for column in self._texts.values()], axis=0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """All rows of a batch at once; PyTorch's DataLoader calls this."""
        cells: dict[str, list[Any]] = {name: column.take(indices) for name, column in self._texts.items()}
        if self._rest is not None:
            cells |= self._rest[indices]
        cells["dataset_name"] = [self._dataset_name] * len(indices)
        return [
            dict(zip(self._names, row, strict=True)) for row in zip(*(cells[name] for name in self._names), strict=True)
        ]


@dataclass(frozen=True)
class Padding:
    """Makes of token ids what the model's `preprocess` makes of their texts."""

    padding_id: int
    left: bool
    """Whether padding stands before the text."""
    features: dict[str | None, dict[str, Any]]
    """Prompt -> every feature by name, in order; those of `TENSORS` are made anew, others stay."""

    def __call__(self, inputs: list[np.ndarray], prompt: str | None = None, **_: Any) -> dict[str, Any]:
        """The features of a column; input_ids and the like [N, L] int64."""
        lengths = np.fromiter(map(len, inputs), np.int64, len(inputs))[:, None]
        width = lengths.max()
        places = np.arange(width)
        real = places >= width - lengths if self.left else places < lengths
        ids = np.full(real.shape, self.padding_id, np.int64)
        ids[real] = np.concatenate(inputs)
        made = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(real.astype(np.int64)),
            "token_type_ids": torch.zeros(ids.shape, dtype=torch.int64),
        }
        return {name: made.get(name, value) for name, value in self.features[prompt].items()}

    def unpadded(self, inputs: list[np.ndarray], prompt: str | None = None, **_: Any) -> dict[str, Any]:
        """The token ids as they are, with the features that are no tensors."""
        others = {name: value for name, value in self.features[prompt].items() if name not in TENSORS}
        return {"column": _Column(inputs, others)}


class _Column(NamedTuple):
    ids: list[np.ndarray]
    others: dict[str, Any]


@dataclass(frozen=True)
class RowLayout:
    """How flat rows are laid out for one model."""

    padding_id: int | None
    """As `Engine.padding_id`."""
    token_types: bool
    """Whether the model takes `token_type_ids`."""
    ignored: frozenset[str]
    """Features that no module of the model reads; columns that differ in them share a row."""
    datasets: frozenset[str | None]
    """Names of the data sets whose loss takes embeddings that one pass computed; None for a batch without a name."""


class TokenCollator:
    """Makes batches of the rows of `TokenRows`: flat rows where one pass serves, else padded features.

    Args:
        collator: the one that would tokenise.
        padding: takes the place of its `preprocess_fn`.
        layout: None where the model does not pack.
    """

    def __init__(self, collator: BaseDataCollator, padding: Padding, layout: RowLayout | None) -> None:
        self.padded = replace(collator, preprocess_fn=padding)
        self._unpadded = replace(collator, preprocess_fn=padding.unpadded)
        self._layout = layout

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch as `collator` makes it; of a flat row the columns' features are one `PackedRow` instead."""
        if self._layout is not None and rows and rows[0].get("dataset_name") in self._layout.datasets:
            batch = self._in_a_row(self._unpadded(rows), self._layout)
            if batch is not None:
                return batch
        return self.padded(rows)

    @staticmethod
    def _in_a_row(batch: dict[str, Any], layout: RowLayout) -> dict[str, Any] | None:
        """The batch with its columns in one row; None if they cannot share it, or a text has no token."""
        columns = [value for value in batch.values() if isinstance(value, _Column)]
        others = [
            {name: value for name, value in each.others.items() if name not in layout.ignored} for each in columns
        ]
        if any(each != others[0] for each in others) or not all(map(len, itertools.chain(*(c.ids for c in columns)))):
            return None
        row = PackedRow.of([column.ids for column in columns], layout.padding_id, layout.token_types, others[0])
        return {name: value for name, value in batch.items() if not isinstance(value, _Column)} | {PREPARED: row}
