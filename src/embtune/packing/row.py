"""A flat row that was laid out before its step, by the worker that assembled the batch from token ids.

T tokens and N texts: all texts of the batch's first column, then of its second, and so on, as `flatten` has them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embtune.packing.layout import Packing, RowAttention, row_mask

PREPARED = "embtune_row"
"""The feature, and the key of a batch, under which a `PackedRow` stands in the place of padded features."""


@dataclass(frozen=True, eq=False)
class PackedRow:
    """All that a forward needs: moved to the device in two copies, after which nothing waits for it."""

    tokens_3T: Tensor
    """[3, T] int64: token ids; position ids; the index of the text that each token belongs to."""
    cu_seqlens: Tensor
    """[N + 1] int32: text i is the tokens `cu_seqlens[i] : cu_seqlens[i + 1]`."""
    lengths: tuple[int, ...]
    """Tokens of each text, N numbers, each at least 1; they stay on the host."""
    columns: tuple[int, ...]
    """How many of the texts belong to each column."""
    token_types: bool
    """Whether the model takes `token_type_ids`, which are all 0."""
    others: Mapping[str, Any]
    """Features that are no tensors, such as the modality; the same for all columns."""

    @classmethod
    def of(
        cls,
        columns: Sequence[Sequence[np.ndarray]],
        padding_id: int | None = None,
        token_types: bool = False,
        others: Mapping[str, Any] | None = None,
    ) -> "PackedRow":
        """Lay texts end to end.

        Args:
            columns: the token ids of each text, column by column; no text is empty.
            padding_id: as `flatten` takes it.
        """
        texts = [ids for column in columns for ids in column]
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        ends = lengths.cumsum()
        tokens = np.empty((3, ends[-1]), np.int64)
        np.concatenate(texts, out=tokens[0])
        tokens[2] = np.repeat(np.arange(len(texts)), lengths)
        if padding_id is None:
            tokens[1] = np.arange(ends[-1]) - (ends - lengths)[tokens[2]]
        else:
            counted = tokens[0] != padding_id
            before = np.concatenate([[0], counted.cumsum()])
            tokens[1] = (before[1:] - before[ends - lengths][tokens[2]]) * counted + padding_id
        return cls(
            torch.from_numpy(tokens),
            torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
            tuple(lengths.tolist()),
            tuple(map(len, columns)),
            token_types,
            others or {},
        )

    def pin_memory(self) -> "PackedRow":
        """In memory that the device copies from without the host waiting; PyTorch's DataLoader calls this."""
        return replace(self, tokens_3T=_pinned(self.tokens_3T), cu_seqlens=_pinned(self.cu_seqlens))

    def to(self, device: torch.device | str | int, non_blocking: bool = True) -> "PackedRow":  # noqa: ARG002
        """On the device; never waits for it, whatever `non_blocking` says: accelerate asks to wait by default."""
        tokens, cu_seqlens = (part.to(device, non_blocking=True) for part in (self.tokens_3T, self.cu_seqlens))
        return replace(self, tokens_3T=tokens, cu_seqlens=cu_seqlens)

    def features(self) -> dict[str, Any]:
        """The features of the row [1, T], all but the mask, which depends on the attention that reads it."""
        row = {**self.others, "input_ids": self.tokens_3T[:1]}
        if self.token_types:
            row["token_type_ids"] = torch.zeros_like(row["input_ids"])
        row["position_ids"] = self.tokens_3T[1:2]
        row["cu_seq_lens_q"] = self.cu_seqlens
        row["seq_idx"] = self.tokens_3T[2:]
        return row

    def flatten(self, dtype: torch.dtype, mask_value: float, attention: RowAttention) -> tuple[dict[str, Any], Packing]:
        """What the function `flatten` makes of padded features: those of one row [1, T], and the packing."""
        packing = Packing(list(self.lengths), self.tokens_3T.device)
        packing.cu_seqlens, packing.text_of_token = self.cu_seqlens, self.tokens_3T[2]
        row = self.features()
        row["attention_mask"] = row_mask(packing, dtype, mask_value, attention)
        return row, packing


def _pinned(tensor: Tensor) -> Tensor:
    # PyTorch's own copy wakes its threads for this, which takes 0.2 to 5 ms where NumPy's takes 0.05.
    pinned = torch.empty_like(tensor, pin_memory=True)
    np.copyto(pinned.numpy(), tensor.numpy())
    return pinned
