"""Pre-norm layers whose residual stream is float32 and meets each norm in one kernel.

A half-precision base adds the output of every sublayer to one stream: rounded to bfloat16 after each addition, what
the stream holds loses its last digits two times a layer. Autocast over float32 weights keeps it in float32, and so do
these layers: the first takes the half-precision stream and gives a float32 one, and the last norm of the backbone gives
float32. Sublayers read what is normalised, in the dtype of the norm's weight. Of a float32 base nothing changes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.eurobert.modeling_eurobert import EuroBertDecoderLayer
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.modernbert.modeling_modernbert import ModernBertEncoderLayer, ModernBertModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from embtune.kernels.add_norm import add_norm
from embtune.models.fused_checks import is_half, is_own, is_plain_norm, is_whole, serve
from embtune.models.fused_norms import RMS_NORMS, FusedGemma3RMSNorm, WideLayerNorm


def _carries(stream: Tensor, norms: Sequence[nn.Module], *classes: type[nn.Module]) -> bool:
    # Under autocast, a base in half precision has a stream that autocast rules.
    if not serve(stream) or not all(is_plain_norm(norm, *classes) for norm in norms):
        return False
    weights: list[Any] = [norm.weight for norm in norms]
    [dtype, *others] = {weight.dtype for weight in weights}
    if others:
        return False
    return stream.dtype == dtype == torch.float32 or (is_half(weights[0]) and stream.dtype in (torch.float32, dtype))


def _narrow(stream: Tensor, norm: nn.Module) -> Tensor:
    """The stream as the original layer takes it: in the dtype of its norms, if that is half precision."""
    parameter = next(norm.parameters(), None)
    return stream if parameter is None or not is_half(parameter) else stream.to(parameter.dtype)


class _FusedLayer(nn.Module):
    """Llama's layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        first, second = self.input_layernorm, self.post_attention_layernorm
        if args or not _carries(hidden_states, (first, second), *RMS_NORMS):
            return super().forward(_narrow(hidden_states, second), *args, **kwargs)
        stream, states = _add_rms_norm(hidden_states, None, first)
        attended, _ = self.self_attn(hidden_states=states, **{"attention_mask": None, **kwargs})
        stream, states = _add_rms_norm(stream, attended, second)
        return stream + self.mlp(states)


def _add_rms_norm(stream: Tensor, hidden: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    return add_norm(stream, hidden, norm.weight, None, norm.variance_epsilon, "rms")


def _add_gemma_norm(stream: Tensor, hidden: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    return add_norm(stream, hidden, norm.weight, None, norm.eps, "rms", unit_offset=True)


def _add_layer_norm(stream: Tensor, hidden: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    return add_norm(stream, hidden, norm.weight, norm.bias, norm.eps, "layer")


class FusedLlamaDecoderLayer(_FusedLayer, LlamaDecoderLayer): ...


class FusedMistralDecoderLayer(_FusedLayer, MistralDecoderLayer): ...


class FusedQwen2DecoderLayer(_FusedLayer, Qwen2DecoderLayer): ...


class FusedQwen3DecoderLayer(_FusedLayer, Qwen3DecoderLayer): ...


class FusedEuroBertDecoderLayer(_FusedLayer, EuroBertDecoderLayer): ...


class FusedGemma3DecoderLayer(Gemma3DecoderLayer):
    """Each sublayer's output has a norm of its own before it is added; that one is called as a module."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        first, second = self.input_layernorm, self.pre_feedforward_layernorm
        if args or not _carries(hidden_states, (first, second), FusedGemma3RMSNorm):
            return super().forward(_narrow(hidden_states, second), *args, **kwargs)
        stream, states = _add_gemma_norm(hidden_states, None, first)
        attended, _ = self.self_attn(hidden_states=states, **kwargs)
        stream, states = _add_gemma_norm(stream, self.post_attention_layernorm(attended), second)
        return stream + self.post_feedforward_layernorm(self.mlp(states))


class FusedModernBertEncoderLayer(ModernBertEncoderLayer):
    """The first layer has no norm before its attention: the embeddings end with one."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        first, second = self.attn_norm, self.mlp_norm
        begins = is_own(first, nn.Identity)
        if args or not _carries(hidden_states, (second,) if begins else (first, second), nn.LayerNorm):
            return super().forward(_narrow(hidden_states, second), *args, **kwargs)
        stream, states = hidden_states, _narrow(hidden_states, second)
        if not begins:
            stream, states = _add_layer_norm(hidden_states, None, first)
        attended, _ = self.attn(states, **kwargs)
        stream, states = _add_layer_norm(stream, attended, second)
        return stream + self.mlp(states)


LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    subclass.__bases__[-1]: subclass
    for subclass in (
        FusedLlamaDecoderLayer,
        FusedMistralDecoderLayer,
        FusedQwen2DecoderLayer,
        FusedQwen3DecoderLayer,
        FusedEuroBertDecoderLayer,
        FusedGemma3DecoderLayer,
        FusedModernBertEncoderLayer,
    )
}
"""Layers, and what they become where all layers of a backbone hand on a float32 stream."""


def ends_of_streams(backbone: nn.Module) -> list[nn.Module]:
    """The LayerNorms that give a ModernBERT its residual stream and take it from the last layer."""
    models: list[Any] = [module for module in backbone.modules() if isinstance(module, ModernBertModel)]
    return [norm for model in models for norm in (model.embeddings.norm, model.final_norm)]


def can_widen(backbone: nn.Module) -> bool:
    """Whether a backbone has pre-norm layers, and everything from its embeddings to its last norm takes float32."""
    has_layers = any(isinstance(module, tuple(LAYERS)) for module in backbone.modules())
    return (
        has_layers
        and is_whole(backbone, LAYERS)
        and all(
            type(norm) in (nn.LayerNorm, WideLayerNorm) and "forward" not in vars(norm) and norm.weight is not None
            for norm in ends_of_streams(backbone)
        )
    )
