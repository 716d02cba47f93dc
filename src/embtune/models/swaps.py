"""Architectures whose attention has no interface: on the instance, modules become subclasses that know a packed row.

Every swap is `module.__class__ = Subclass`, so parameters, names, deep copies, pickles, PEFT and gradient checkpointing
stay as they were, and assigning the original class undoes it. A batch without a `PackedMask` takes the original way.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Encoder, DisentangledSelfAttention
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder, MPNetSelfAttention
from transformers.models.t5.modeling_t5 import T5Attention

from embtune.packing.attention import attend_groups, attend_tiles, is_bounds_mask, take
from embtune.packing.layout import PackedMask


class PackedMPNetSelfAttention(MPNetSelfAttention):
    """Adds MPNet's relative bias to the scores of each group of texts."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **others: Any,
    ) -> tuple[Tensor, ...]:
        if not (isinstance(attention_mask, PackedMask) or is_bounds_mask(attention_mask)):
            return super().forward(hidden_states, attention_mask, position_bias, output_attentions, **others)
        shape = (-1, self.num_attention_heads, self.attention_head_size)
        states_TC = hidden_states.squeeze(0)
        q_THD, k_THD, v_THD = (project(states_TC).view(shape) for project in (self.q, self.k, self.v))
        dropout = self.dropout.p if self.training else 0.0
        if is_bounds_mask(attention_mask):
            out_THD = attend_tiles(q_THD, k_THD, v_THD, attention_mask, dropout, None, False, None, position_bias)
        else:
            # The bias is an embedding in the weights' dtype; under autocast the states may have another.
            bias_HLL = None if position_bias is None else position_bias[0].to(q_THD.dtype)
            out_THD = attend_groups(q_THD, k_THD, v_THD, attention_mask, dropout, None, False, None, bias_HLL=bias_HLL)
        return (self.o(out_THD.flatten(1)).unsqueeze(0),)


class PackedMPNetEncoder(MPNetEncoder):
    """Computes the relative bias once for each distance, or for the longest text, and not [H, T, T] for the row."""

    _longest: int | None = None
    _by_distance = False

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        self._longest = attention_mask.packing.max_length if isinstance(attention_mask, PackedMask) else None
        self._by_distance = is_bounds_mask(attention_mask)
        return super().forward(hidden_states, attention_mask, *args, **kwargs)

    def compute_position_bias(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self._by_distance:
            return super().compute_position_bias(x[:, : self._longest], *args, **kwargs)
        # All that is farther than 128 falls into the last bucket.
        distance_R = torch.arange(-128, 129, device=x.device)
        return self.relative_attention_bias(self.relative_position_bucket(distance_R)).T.float()


class PackedDisentangledSelfAttention(DisentangledSelfAttention):
    """Runs DeBERTa's own attention on each group of texts, padded side by side."""

    @torch.compiler.disable
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(attention_mask, PackedMask):
            return super().forward(
                hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
            )
        packing = attention_mask.packing
        states_TC = hidden_states[0]
        states_SC = states_TC.new_zeros(packing.slots, states_TC.shape[1])
        states_SC = states_SC.index_copy(0, packing.slot_of_token, states_TC)
        parts = []
        for group in packing.groups:
            n, length = group.count, group.length
            real = (
                torch.ones(n, 1, 1, length, device=states_TC.device, dtype=torch.bool)
                if group.real is None
                else group.real
            )
            near = None if relative_pos is None else relative_pos[:, :length, :length]
            states_nLC = states_SC[group.start : group.start + n * length].view(n, length, -1)
            out_nLC, _ = super().forward(
                states_nLC,
                (real & real.transpose(-1, -2)).long(),
                relative_pos=near,
                rel_embeddings=rel_embeddings,
            )
            parts.append(out_nLC.flatten(0, 1))
        return take(torch.cat(parts), packing.slot_of_token).unsqueeze(0), None


class PackedDebertaV2Encoder(DebertaV2Encoder):
    """Computes relative positions for the longest text, where the original would for the whole row: [T, T]."""

    _longest: int | None = None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._longest = attention_mask.packing.max_length if isinstance(attention_mask, PackedMask) else None
        return super().forward(hidden_states, attention_mask, *args, **kwargs)

    def get_rel_pos(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().get_rel_pos(hidden_states[:, : self._longest], *args, **kwargs)


class PackedT5Attention(T5Attention):
    """Adds T5's relative bias to the scores of each group; the first layer computes it for the longest text."""

    @torch.compiler.disable
    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor, None]:
        if not (isinstance(mask, PackedMask) or is_bounds_mask(mask)):
            return super().forward(hidden_states, mask, key_value_states, position_bias, **others)
        shape = (-1, self.n_heads, self.key_value_proj_dim)
        states_TC = hidden_states.squeeze(0)
        q_THD, k_THD, v_THD = (project(states_TC).view(shape) for project in (self.q, self.k, self.v))
        dropout = self.dropout if self.training else 0.0
        if is_bounds_mask(mask):
            bias_HR = self._bias_by_distance() if position_bias is None else position_bias
            out_THD = attend_tiles(q_THD, k_THD, v_THD, mask, dropout, self.scaling, False, None, bias_HR)
            return self.o(out_THD.flatten(1)).unsqueeze(0), bias_HR, None
        if position_bias is None:
            longest = mask.packing.max_length
            position_bias = self.compute_bias(longest, longest)
        # The bias is an embedding in the weights' dtype; under autocast the states may have another.
        bias_HLL = position_bias[0].to(q_THD.dtype)
        out_THD = attend_groups(q_THD, k_THD, v_THD, mask, dropout, self.scaling, False, None, bias_HLL=bias_HLL)
        return self.o(out_THD.flatten(1)).unsqueeze(0), position_bias, None

    def _bias_by_distance(self) -> Tensor:
        # All that is farther falls into the last bucket.
        reach, table = self.relative_attention_max_distance, self.relative_attention_bias
        distance_R = torch.arange(-reach, reach + 1, device=table.weight.device)
        buckets_R = self._relative_position_bucket(
            distance_R, num_buckets=self.relative_attention_num_buckets, max_distance=reach
        )
        return table(buckets_R).T.float()


_SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    MPNetSelfAttention: PackedMPNetSelfAttention,
    MPNetEncoder: PackedMPNetEncoder,
    DisentangledSelfAttention: PackedDisentangledSelfAttention,
    DebertaV2Encoder: PackedDebertaV2Encoder,
    T5Attention: PackedT5Attention,
}


def swap_attention(backbone: nn.Module) -> list[str]:
    """Let a backbone without an attention interface take packed rows; returns the names of the modules changed."""
    changed = []
    for name, module in backbone.named_modules():
        subclass = _SWAPS.get(type(module))
        if subclass is not None:
            module.__class__ = subclass
            changed.append(name)
    return changed


def has_swaps(backbone: nn.Module) -> bool:
    """Whether the attention of this backbone has been swapped."""
    return any(type(module) in _SWAPS.values() for module in backbone.modules())


def undo_swaps(backbone: nn.Module) -> None:
    """Give every module whose attention was swapped its own class back."""
    give_classes_back(backbone, _SWAPS)


def give_classes_back(backbone: nn.Module, swaps: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Undo swaps, given as original class -> subclass, on every module of a backbone."""
    originals = {subclass: original for original, subclass in swaps.items()}
    for module in backbone.modules():
        if type(module) in originals:
            module.__class__ = originals[type(module)]
