"""The flat row: where each text begins, and the groups of similar length in which plain SDPA attends over it.

Shapes: N texts, T real tokens in all, S slots of the padded groups (S ≥ T), L the longest text of a group.
"""

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from embtune.kernels.row_attention import text_bounds

RowAttention: TypeAlias = Literal["tiles", "flash", "windows", "groups"]
"""What computes the attention of a row: `row_attention`, variable-length FlashAttention, or SDPA over groups."""

# A text joins a group if it is at least this share of the group's longest: at most a quarter of a group is padding.
_SIMILAR = 0.75
# …or if it is shorter by no more than this: below it another kernel launch costs more than the padding.
_SLACK = 16


@dataclass(frozen=True)
class Group:
    """Texts of similar length, side by side in the slots `start : start + count * length`."""

    start: int
    """First slot."""
    count: int
    """Number of texts, n."""
    length: int
    """Length of the longest, L; each text has this many slots."""
    real: Tensor | None
    """[n, 1, 1, L] bool: which slots hold tokens; None where all do."""


@dataclass(eq=False)
class Packing:
    """Where the texts of one flat row begin and end."""

    lengths: list[int]
    """Tokens of each text, N numbers, each at least 1."""
    device: torch.device
    """Where the index tensors live."""
    place: Tensor | None = None
    """[T] int64: where each token stood in the flattened padded batch; None for a row that never was one."""
    _masks: dict[tuple[int, int | None, bool], Tensor | None] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, cu_seqlens: Tensor) -> "Packing":
        """The packing that begins and ends texts there; waits for the device."""
        return cls(cu_seqlens.diff().tolist(), cu_seqlens.device)

    @property
    def tokens(self) -> int:
        """T, all real tokens."""
        return sum(self.lengths)

    @property
    def max_length(self) -> int:
        """The longest text in tokens."""
        return max(self.lengths)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """[N + 1] int32: text i is the tokens `cu_seqlens[i] : cu_seqlens[i + 1]`."""
        ends = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return ends.to(self.device, non_blocking=True)

    @cached_property
    def text_of_token(self) -> Tensor:
        """[T] int64: the index of the text that each token belongs to."""
        lengths = torch.tensor(self.lengths)
        return torch.repeat_interleave(torch.arange(len(self.lengths)), lengths).to(self.device, non_blocking=True)

    @cached_property
    def groups(self) -> list[Group]:
        """The texts by falling length, cut into groups of similar length."""
        groups, start = [], 0
        for members in self._members:
            lengths = torch.tensor([self.lengths[text] for text in members])
            longest = int(lengths[0])
            real = None
            if int(lengths[-1]) < longest:
                real = (torch.arange(longest) < lengths[:, None])[:, None, None, :].to(self.device)
            groups.append(Group(start, len(members), longest, real))
            start += len(members) * longest
        return groups

    @cached_property
    def _members(self) -> list[list[int]]:
        order = sorted(range(len(self.lengths)), key=self.lengths.__getitem__, reverse=True)
        members: list[list[int]] = []
        for text in order:
            longest = self.lengths[members[-1][0]] if members else 0
            length = self.lengths[text]
            if members and (length >= _SIMILAR * longest or longest - length <= _SLACK):
                members[-1].append(text)
            else:
                members.append([text])
        return members

    @cached_property
    def slots(self) -> int:
        """S, the slots of all groups together."""
        return sum(group.count * group.length for group in self.groups)

    @cached_property
    def slot_of_token(self) -> Tensor:
        """[T] int64, no slot twice: where each token of the row stands in the groups."""
        starts = [0, *itertools.accumulate(self.lengths)]
        slot = torch.empty(self.tokens, dtype=torch.int64)
        for group, members in zip(self.groups, self._members, strict=True):
            for row, text in enumerate(members):
                first = group.start + row * group.length
                slot[starts[text] : starts[text + 1]] = torch.arange(first, first + self.lengths[text])
        return slot.to(self.device, non_blocking=True)

    def allowed(self, index: int, window: int | None, causal: bool) -> Tensor | None:
        """[n or 1, 1, L or 1, L] bool: which keys each query of group `index` may read; None where it may read all.

        A sliding window of w lets i read j iff |i - j| < w, transformers' convention.
        """
        key = (index, window, causal)
        if key not in self._masks:
            group = self.groups[index]
            mask = group.real
            if causal or (window is not None and window < group.length):
                position = torch.arange(group.length, device=self.device)
                distance = position[:, None] - position[None, :]
                near = distance.abs() < (window or group.length)
                if causal:
                    near &= distance >= 0
                # A query of padding whose window holds no token would read nothing, which is NaN: let it read itself.
                mask = near[None, None] if mask is None else (mask & near) | (distance == 0)
            self._masks[key] = mask
        return self._masks[key]


class PackedMask(Tensor):
    """What a packed row brings in the place of an attention mask: a single number that carries the packing.

    A 4-D mask passes through every transformers model untouched to its attention. The number is 0, which changes
    nothing where it is added to scores, or 1 for the models that multiply embeddings by their mask. Travelling as an
    argument it survives gradient checkpointing, where anything kept aside would be gone when layers are computed again.
    """

    packing: Packing

    # What is computed with the mask is an ordinary tensor: DeBERTa's states, multiplied by it, would be masks as well.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def of(cls, packing: Packing, dtype: torch.dtype, value: float = 0) -> "PackedMask":
        """The mask of one packed row; `dtype` is the backbone's."""
        mask = torch.full((1, 1, 1, 1), value, dtype=dtype, device=packing.device).as_subclass(cls)
        mask.packing = packing
        return mask


WINDOWS_MASK_STEP = 512
"""Tokens of the longest text for which a `windows_mask` has one row."""


def flash_mask(cu_seqlens: Tensor, max_length: int) -> Tensor:
    """The attention mask of a row that variable-length FlashAttention serves: [1, 1, L, N + 1] int32.

    It is `cu_seqlens`, spread over as many rows as the longest text may have tokens. So both reach the attention as one
    plain 4-D tensor, which compiled and recorded code can take, and no mask that adds or selects has integers.
    """
    return cu_seqlens.view(1, 1, 1, -1).expand(1, 1, max_length, -1)


def bounds_mask(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The attention mask of a row that `row_attention` serves: [2, 1, 1, T] int32.

    It holds where the text of each token begins and ends, found once for all layers. A `flash_mask` has a first axis
    of 1.
    """
    return torch.stack(text_bounds(cu_seqlens, tokens))[:, None, None]


def windows_mask(cu_seqlens: Tensor, tokens: int, max_length: int) -> Tensor:
    """The attention mask of a row that `row_attention` serves in layers with a narrow window, FlashAttention in others.

    [2, 1, L / 512, T + N + 1] int32: a `bounds_mask`, and behind it `cu_seqlens`, spread over a row for each 512 tokens
    that the longest text may have: one for each token, as in a `flash_mask`, would be gigabytes if somebody copied it.
    """
    bounds_2T = torch.stack(text_bounds(cu_seqlens, tokens))
    both = torch.cat([bounds_2T, cu_seqlens.expand(2, -1)], dim=1)
    return both[:, None, None].expand(-1, -1, -(-max_length // WINDOWS_MASK_STEP), -1)


def kernel_mask(cu_seqlens: Tensor, tokens: int, max_length: int, attention: RowAttention) -> Tensor:
    """The attention mask for a kernel over the whole row, as all of `RowAttention` are but groups."""
    if attention == "tiles":
        return bounds_mask(cu_seqlens, tokens)
    if attention == "windows":
        return windows_mask(cu_seqlens, tokens, max_length)
    return flash_mask(cu_seqlens, max_length)


def row_mask(packing: Packing, dtype: torch.dtype, mask_value: float, attention: RowAttention) -> Tensor:
    """What stands in the place of a row's attention mask, for the attention that will read it."""
    if attention == "groups":
        return PackedMask.of(packing, dtype, mask_value)
    return kernel_mask(packing.cu_seqlens, packing.tokens, packing.max_length, attention)
