"""Attention modules that turn queries and keys by their positions in one kernel; everything else is the original's.

Angles of a half-precision base are computed and kept in float32: in bfloat16, a cosine has two decimal digits.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.eurobert.modeling_eurobert import EuroBertAttention, EuroBertRotaryEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, Gemma3RotaryEmbedding
from transformers.models.jina_embeddings_v3.modeling_jina_embeddings_v3 import (
    JinaEmbeddingsV3Attention,
    JinaEmbeddingsV3RotaryEmbedding,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralRotaryEmbedding
from transformers.models.modernbert.modeling_modernbert import ModernBertAttention, ModernBertRotaryEmbedding
from transformers.models.nomic_bert.modeling_nomic_bert import NomicBertAttention, NomicBertRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

from embtune.kernels.norm_rotary import norm_rotate
from embtune.kernels.rotary import MAX_HEAD_DIM, rotate, rotate_joined
from embtune.models.fused_checks import is_half, is_plain_norm, serve
from embtune.models.fused_norms import FusedGemma3RMSNorm, FusedQwen3RMSNorm


class _FusedAttention(nn.Module):
    """Projections, rotary embeddings, the attention function that the config names, output projection."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        angles = kwargs.get("position_embeddings")
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation)
        if args or attend is None or angles is None or not self._turns(hidden_states, angles[0]):
            if angles is not None and is_half(hidden_states):
                kwargs["position_embeddings"] = tuple(each.to(hidden_states.dtype) for each in angles)
            return super().forward(hidden_states, *args, **kwargs)
        kwargs.pop("position_embeddings")
        mask, cache = kwargs.pop("attention_mask", None), kwargs.pop("past_key_values", None)
        shape = hidden_states.shape[:-1]
        # [T, heads, D] of all texts, to [B, heads, L, D] as the attention functions take them.
        query, key, value = (
            states.unflatten(0, shape).transpose(1, 2) for states in self._projected(hidden_states, *angles)
        )
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        dropout = self.attention_dropout if self.training else 0.0
        attended, weights = attend(self, query, key, value, mask, dropout=dropout, **self._settings(), **kwargs)
        return self._output(attended.reshape(*shape, -1).contiguous()), weights

    def _turns(self, hidden_states: Tensor, cos: Tensor) -> bool:
        # Rotary embeddings of a part of each head are the original's matter.
        whole_heads = cos.shape[-1] == self.head_dim <= MAX_HEAD_DIM
        return serve(hidden_states) and whole_heads and cos.shape[-2] == hidden_states.shape[-2]

    def _projected(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = (-1, self.head_dim)
        query, key, value = (
            project(hidden_states).unflatten(-1, heads) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return *self._turned(query.flatten(0, -3), key.flatten(0, -3), cos, sin), value.flatten(0, -3)

    def _turned(self, q_THD: Tensor, k_TGD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotate(q_THD, k_TGD, cos, sin)

    def _settings(self) -> dict[str, Any]:
        return {"scaling": self.scaling}

    def _output(self, attended: Tensor) -> Tensor:
        return self.o_proj(attended)


class _Windowed(_FusedAttention):
    def _settings(self) -> dict[str, Any]:
        return {"scaling": self.scaling, "sliding_window": self.sliding_window}


class _NormedHeads(_Windowed):
    _unit_offset = False

    def _turned(self, q_THD: Tensor, k_TGD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q_norm, k_norm = self.q_norm, self.k_norm
        if not all(is_plain_norm(norm, FusedQwen3RMSNorm, FusedGemma3RMSNorm) for norm in (q_norm, k_norm)):
            return rotate(q_norm(q_THD), k_norm(k_TGD), cos, sin)
        eps = self.config.rms_norm_eps
        return norm_rotate(q_THD, k_TGD, q_norm.weight, k_norm.weight, eps, cos, sin, self._unit_offset)


class FusedLlamaAttention(_FusedAttention, LlamaAttention): ...


class FusedEuroBertAttention(_FusedAttention, EuroBertAttention): ...


class FusedNomicBertAttention(_FusedAttention, NomicBertAttention): ...


class FusedJinaEmbeddingsV3Attention(_FusedAttention, JinaEmbeddingsV3Attention): ...


class FusedQwen2Attention(_Windowed, Qwen2Attention): ...


class FusedQwen3Attention(_NormedHeads, Qwen3Attention): ...


class FusedGemma3Attention(_NormedHeads, Gemma3Attention):
    _unit_offset = True


class FusedMistralAttention(_FusedAttention, MistralAttention):
    def _settings(self) -> dict[str, Any]:
        return {"scaling": self.scaling, "sliding_window": getattr(self.config, "sliding_window", None)}


class FusedModernBertAttention(_FusedAttention, ModernBertAttention):
    def _projected(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.Wqkv(hidden_states).flatten(0, -2)
        return rotate_joined(qkv.view(len(qkv), 3, -1, self.head_dim), cos, sin)

    def _settings(self) -> dict[str, Any]:
        return {
            "scaling": self.head_dim**-0.5,
            "sliding_window": self.sliding_window,
            "deterministic": self.deterministic_flash_attn,
        }

    def _output(self, attended: Tensor) -> Tensor:
        return self.out_drop(self.Wo(attended))


class _WideAngles(nn.Module):
    """Cosines and sines in float32, also for states in half precision."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # The original reads nothing of x but its device and its dtype.
        wide = x.new_empty(0, dtype=torch.float32) if serve(x) and is_half(x) else x
        return super().forward(wide, *args, **kwargs)


class WideLlamaRotaryEmbedding(_WideAngles, LlamaRotaryEmbedding): ...


class WideEuroBertRotaryEmbedding(_WideAngles, EuroBertRotaryEmbedding): ...


class WideNomicBertRotaryEmbedding(_WideAngles, NomicBertRotaryEmbedding): ...


class WideJinaEmbeddingsV3RotaryEmbedding(_WideAngles, JinaEmbeddingsV3RotaryEmbedding): ...


class WideQwen2RotaryEmbedding(_WideAngles, Qwen2RotaryEmbedding): ...


class WideQwen3RotaryEmbedding(_WideAngles, Qwen3RotaryEmbedding): ...


class WideGemma3RotaryEmbedding(_WideAngles, Gemma3RotaryEmbedding): ...


class WideMistralRotaryEmbedding(_WideAngles, MistralRotaryEmbedding): ...


class WideModernBertRotaryEmbedding(_WideAngles, ModernBertRotaryEmbedding): ...


ATTENTION: dict[type[nn.Module], type[nn.Module]] = {
    subclass.__bases__[-1]: subclass
    for subclass in (
        FusedLlamaAttention,
        FusedEuroBertAttention,
        FusedNomicBertAttention,
        FusedJinaEmbeddingsV3Attention,
        FusedQwen2Attention,
        FusedQwen3Attention,
        FusedGemma3Attention,
        FusedMistralAttention,
        FusedModernBertAttention,
    )
}
"""Attention modules, and what they become."""

ROTARY: dict[type[nn.Module], type[nn.Module]] = {
    subclass.__bases__[-1]: subclass
    for subclass in (
        WideLlamaRotaryEmbedding,
        WideEuroBertRotaryEmbedding,
        WideNomicBertRotaryEmbedding,
        WideJinaEmbeddingsV3RotaryEmbedding,
        WideQwen2RotaryEmbedding,
        WideQwen3RotaryEmbedding,
        WideGemma3RotaryEmbedding,
        WideMistralRotaryEmbedding,
        WideModernBertRotaryEmbedding,
    )
}
"""Modules that compute angles, and what they become where every attention module of a backbone takes float32 ones."""

# GTE came with a later transformers than the oldest that embtune takes.
if "gte" in CONFIG_MAPPING:
    from transformers.models.gte.modeling_gte import GteAttention, GteRotaryEmbedding

    class FusedGteAttention(_FusedAttention, GteAttention): ...

    class WideGteRotaryEmbedding(_WideAngles, GteRotaryEmbedding): ...

    ATTENTION[GteAttention] = FusedGteAttention
    ROTARY[GteRotaryEmbedding] = WideGteRotaryEmbedding
