"""Norms in one kernel each way."""

import torch
from torch import Tensor, nn
from transformers.models.eurobert.modeling_eurobert import EuroBertRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from embtune.kernels.add_norm import add_norm
from embtune.kernels.rms_norm import rms_norm
from embtune.kernels.tiles import MAX_COLUMNS
from embtune.models.fused_checks import is_half, serve


class _RMSNorm(nn.Module):
    """weight · normalised x, rounded as Llama does."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not serve(hidden_states) or len(self.weight) > MAX_COLUMNS:
            return super().forward(hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class FusedQwen2RMSNorm(_RMSNorm, Qwen2RMSNorm): ...


class FusedQwen3RMSNorm(_RMSNorm, Qwen3RMSNorm): ...


class FusedLlamaRMSNorm(_RMSNorm, LlamaRMSNorm): ...


class FusedMistralRMSNorm(_RMSNorm, MistralRMSNorm): ...


class FusedEuroBertRMSNorm(_RMSNorm, EuroBertRMSNorm): ...


class FusedGemma3RMSNorm(Gemma3RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        if not serve(x) or len(self.weight) > MAX_COLUMNS:
            return super().forward(x)
        return rms_norm(x, self.weight, self.eps, unit_offset=True)


class WideLayerNorm(nn.LayerNorm):
    """At the ends of a residual stream: of a half-precision base it takes float32 too, and gives float32."""

    def forward(self, input: Tensor) -> Tensor:
        if not is_half(self.weight):
            return super().forward(input)
        if not serve(input):
            return super().forward(input.to(self.weight.dtype))
        return add_norm(input, None, self.weight, self.bias, self.eps, "layer", dtype=torch.float32)[1]


RMS_NORMS = (FusedQwen2RMSNorm, FusedQwen3RMSNorm, FusedLlamaRMSNorm, FusedMistralRMSNorm, FusedEuroBertRMSNorm)
"""Those that Llama's rounding belongs to."""
