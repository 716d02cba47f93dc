"""Element-wise work of encoder layers in few kernels: on the instance, modules become subclasses that call them.

As in `swaps`, every change is `module.__class__ = Subclass`, and assigning the original class undoes it. Modules are
known by their exact class. A subclass takes the original way wherever the kernels cannot be right or do not run: on
another device, in float64, under torch.compile, or when something inside was replaced or is watched by hooks.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.bert.modeling_bert import BertOutput, BertSelfOutput
from transformers.models.camembert.modeling_camembert import CamembertOutput, CamembertSelfOutput
from transformers.models.distilbert.modeling_distilbert import TransformerBlock
from transformers.models.electra.modeling_electra import ElectraOutput, ElectraSelfOutput
from transformers.models.ernie.modeling_ernie import ErnieOutput, ErnieSelfOutput
from transformers.models.eurobert.modeling_eurobert import EuroBertMLP
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.modernbert.modeling_modernbert import ModernBertMLP
from transformers.models.mpnet.modeling_mpnet import MPNetAttention, MPNetOutput
from transformers.models.nomic_bert.modeling_nomic_bert import NomicBertMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.models.roberta.modeling_roberta import RobertaOutput, RobertaSelfOutput
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaOutput, XLMRobertaSelfOutput

from embtune.kernels.gated import gated, gated_halves
from embtune.kernels.layer_norm import dropout_add_layer_norm
from embtune.models.fused_attention import ATTENTION, ROTARY
from embtune.models.fused_checks import is_own, is_plain_norm, is_whole, serve
from embtune.models.fused_norms import RMS_NORMS, FusedGemma3RMSNorm, WideLayerNorm
from embtune.models.fused_prenorm import LAYERS, can_widen, ends_of_streams
from embtune.models.swaps import give_classes_back

_ACTIVATIONS = {
    type(ACT2FN["silu"]): "silu",
    type(ACT2FN["gelu"]): "gelu",
    type(ACT2FN["gelu_pytorch_tanh"]): "gelu_tanh",
}


def _ends_plainly(module: Any, states: Tensor) -> bool:
    """Whether dropout, residual and LayerNorm at the end of a module are what the kernel computes for these states."""
    dropout = module.dropout
    plain = is_plain_norm(module.LayerNorm, nn.LayerNorm) and is_own(dropout, nn.Dropout) and dropout.p < 1
    return serve(states) and plain


def _add_norm(hidden: Tensor, residual: Tensor, norm: nn.Module, dropout: nn.Module | None = None) -> Tensor:
    p = dropout.p if dropout is not None and dropout.training else 0.0
    # Drawn on the device: nothing waits, a CUDA graph draws anew with each replay, checkpointing draws the same again.
    seed = torch.randint(0, 2**31 - 1, (1,), device=hidden.device) if p > 0 else None
    return dropout_add_layer_norm(hidden, residual, norm.weight, norm.bias, norm.eps, p, seed)


class _DenseAddNorm(nn.Module):
    """LayerNorm(dropout(dense(x)) + residual)."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if not _ends_plainly(self, input_tensor):
            return super().forward(hidden_states, input_tensor)
        return _add_norm(self.dense(hidden_states), input_tensor, self.LayerNorm, self.dropout)


class _GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x))."""

    def forward(self, x: Tensor) -> Tensor:
        if not (serve(x) and is_own(self.act_fn, *_ACTIVATIONS)):
            return super().forward(x)
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), _ACTIVATIONS[type(self.act_fn)]))


class FusedBertSelfOutput(_DenseAddNorm, BertSelfOutput): ...


class FusedBertOutput(_DenseAddNorm, BertOutput): ...


class FusedRobertaSelfOutput(_DenseAddNorm, RobertaSelfOutput): ...


class FusedRobertaOutput(_DenseAddNorm, RobertaOutput): ...


class FusedXLMRobertaSelfOutput(_DenseAddNorm, XLMRobertaSelfOutput): ...


class FusedXLMRobertaOutput(_DenseAddNorm, XLMRobertaOutput): ...


class FusedCamembertSelfOutput(_DenseAddNorm, CamembertSelfOutput): ...


class FusedCamembertOutput(_DenseAddNorm, CamembertOutput): ...


class FusedElectraSelfOutput(_DenseAddNorm, ElectraSelfOutput): ...


class FusedElectraOutput(_DenseAddNorm, ElectraOutput): ...


class FusedErnieSelfOutput(_DenseAddNorm, ErnieSelfOutput): ...


class FusedErnieOutput(_DenseAddNorm, ErnieOutput): ...


class FusedMPNetOutput(_DenseAddNorm, MPNetOutput): ...


class FusedMPNetAttention(MPNetAttention):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        if not _ends_plainly(self, hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        attended, *others = self.attn(hidden_states, *args, **kwargs)
        return _add_norm(attended, hidden_states, self.LayerNorm, self.dropout), *others


class FusedDistilBertBlock(TransformerBlock):
    """Dropout stays where DistilBERT has it, at the end of the feed-forward module."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        first, second = self.sa_layer_norm, self.output_layer_norm
        if not (serve(hidden_states) and is_plain_norm(first, nn.LayerNorm) and is_plain_norm(second, nn.LayerNorm)):
            return super().forward(hidden_states, attention_mask, **kwargs)
        attended, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        between = _add_norm(attended, hidden_states, first)
        return _add_norm(self.ffn(between), between, second)


class FusedQwen2MLP(_GatedMLP, Qwen2MLP): ...


class FusedQwen3MLP(_GatedMLP, Qwen3MLP): ...


class FusedLlamaMLP(_GatedMLP, LlamaMLP): ...


class FusedMistralMLP(_GatedMLP, MistralMLP): ...


class FusedGemma3MLP(_GatedMLP, Gemma3MLP): ...


class FusedEuroBertMLP(_GatedMLP, EuroBertMLP): ...


class FusedNomicBertMLP(_GatedMLP, NomicBertMLP): ...


class FusedModernBertMLP(ModernBertMLP):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if not (serve(hidden_states) and is_own(self.act, *_ACTIVATIONS)):
            return super().forward(hidden_states)
        return self.Wo(self.drop(gated_halves(self.Wi(hidden_states), _ACTIVATIONS[type(self.act)])))


_SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    subclass.__bases__[-1]: subclass
    for subclass in (
        FusedBertSelfOutput,
        FusedBertOutput,
        FusedRobertaSelfOutput,
        FusedRobertaOutput,
        FusedXLMRobertaSelfOutput,
        FusedXLMRobertaOutput,
        FusedCamembertSelfOutput,
        FusedCamembertOutput,
        FusedElectraSelfOutput,
        FusedElectraOutput,
        FusedErnieSelfOutput,
        FusedErnieOutput,
        FusedMPNetOutput,
        FusedMPNetAttention,
        FusedDistilBertBlock,
        *RMS_NORMS,
        FusedGemma3RMSNorm,
        FusedQwen2MLP,
        FusedQwen3MLP,
        FusedLlamaMLP,
        FusedMistralMLP,
        FusedGemma3MLP,
        FusedEuroBertMLP,
        FusedNomicBertMLP,
        FusedModernBertMLP,
    )
}


def fuse_elementwise(backbone: nn.Module) -> list[str]:
    """Let the element-wise work of a backbone run in few kernels; returns the modules changed, by name.

    Norms, residuals, dropout, gates and rotary embeddings; and of a pre-norm backbone in half precision the residual
    stream, recorded hidden states and the last ones become float32, as they are under autocast.

    Does nothing to modules that are fused already, nor to those with a forward of their own on the instance.
    """
    swaps = {**_SWAPS, **ATTENTION}
    if is_whole(backbone, ATTENTION):
        swaps |= ROTARY
    ends: list[nn.Module] = []
    if can_widen(backbone):
        swaps |= LAYERS
        ends = ends_of_streams(backbone)
    changed = []
    for name, module in backbone.named_modules():
        subclass = WideLayerNorm if any(module is end for end in ends) else swaps.get(type(module))
        if subclass is not None and subclass is not type(module) and "forward" not in vars(module):
            module.__class__ = subclass
            changed.append(name)
    return changed


def unfuse_elementwise(backbone: nn.Module) -> None:
    """Give every fused module its own class back."""
    give_classes_back(backbone, {**_SWAPS, **ATTENTION, **ROTARY, **LAYERS, nn.LayerNorm: WideLayerNorm})
