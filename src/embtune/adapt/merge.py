"""Merged weights, one tensor at a time: W + ΔW under the names of the bare transformers model."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import cast

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from embtune.adapt.quantised import dequantised_weight, is_quantised
from embtune.errors import ModelError
from embtune.models.families import unwrapped


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the merged model: known beforehand in name and shape, computed when asked for."""

    name: str
    """Its name in the bare transformers model."""
    shape: torch.Size
    """Its shape, de-quantised."""
    dtype: torch.dtype
    """The dtype in which `compute` returns it."""
    compute: Callable[[], Tensor]
    """Compute the value, detached, on the model's device. It may share memory with the model: do not write to it."""


def iter_merged_tensors(backbone: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for all that `save_pretrained` of the merged model would write, one at a time.

    The sum W + ΔW of the active adapters is taken in float32 on a copy of one layer; the model is never touched, so
    that training goes on as if nothing had happened. A weight shared by two modules comes once, under its first name.

    Args:
        backbone: a transformers model, plain, quantised or with PEFT adapters.
        dtype: of the floating-point tensors; None keeps each one's own, and is float32 for a quantised model.

    Raises:
        ModelError: `backbone` is no transformers model, or carries adapters that cannot be merged.
    """
    for tensor in merged_tensors(backbone, dtype):
        yield tensor.name, tensor.compute()


def merged_tensors(backbone: nn.Module, dtype: torch.dtype | None = None) -> list[MergedTensor]:
    """What `iter_merged_tensors` yields, not yet computed. Each `compute` costs at most one layer of memory.

    Raises:
        ModelError: as `iter_merged_tensors`.
    """
    bare = bare_model(backbone)
    if getattr(getattr(backbone, "active_peft_config", None), "is_prompt_learning", False):
        raise ModelError("Prompt-learning adapters add inputs, not weights; there is nothing to merge into the model.")
    if dtype is None and is_quantised(bare):
        dtype = torch.float32
    # A layer's weight and bias are asked for one after the other: one merge serves both.
    merge_once = lru_cache(maxsize=1)(_merged_layer)
    ignored = set(getattr(bare, "_keys_to_ignore_on_save", None) or ())
    seen: set[tuple[int, str]] = set()
    found = []
    for name, layer, attribute in _walk(bare, ""):
        source = _base_of(layer)
        raw = getattr(source, attribute)
        # An adapted layer differs from another one that its weight is tied to, so the layer itself is what counts.
        identity = (id(raw), "") if source is layer else (id(layer), attribute)
        if identity in seen or name in ignored:
            continue
        seen.add(identity)
        quantised = attribute == "weight" and is_quantised(source)
        shape = torch.Size((source.out_features, source.in_features)) if quantised else raw.shape
        kept = torch.float32 if quantised else raw.dtype
        target = dtype if dtype is not None and kept.is_floating_point else kept
        found.append(MergedTensor(name, shape, target, partial(_value, layer, attribute, target, merge_once)))
    return found


def bare_model(backbone: nn.Module) -> PreTrainedModel:
    """The transformers model inside PEFT's and torch.compile's wrappers.

    Raises:
        ModelError: there is none.
    """
    bare = _uncompiled(unwrapped(_uncompiled(backbone)))
    if not isinstance(bare, PreTrainedModel):
        raise ModelError(f"{type(bare).__name__} is no transformers model in PyTorch; only such a model can be merged.")
    return bare


def _uncompiled(module: nn.Module) -> nn.Module:
    return dict(module.named_children()).get("_orig_mod", module)


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, str]]:
    """(clean name, layer, attribute of the layer's base) of each persistent tensor, in the order of a state dict."""
    module = _in_use(module)
    source = _base_of(module)
    for attribute, _ in source.named_parameters(recurse=False):
        yield prefix + attribute, module, attribute
    for attribute, _ in source.named_buffers(recurse=False):
        if attribute not in source._non_persistent_buffers_set:
            yield prefix + attribute, module, attribute
    for name, child in source.named_children():
        yield from _walk(child, f"{prefix}{name}.")


def _in_use(module: nn.Module) -> nn.Module:
    """What the model's forward reaches through PEFT's training wrappers, and through a compiled layer."""
    module = _uncompiled(module)
    if isinstance(module, ModulesToSaveWrapper):
        trained = [] if module.disable_adapters else [a for a in module.active_adapters if a in module.modules_to_save]
        return module.modules_to_save[trained[0]] if trained else module.original_module
    if isinstance(module, TrainableTokensWrapper):
        return module.token_adapter
    return module


def _base_of(layer: nn.Module) -> nn.Module:
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def _value(
    layer: nn.Module,
    attribute: str,
    dtype: torch.dtype,
    merge_once: Callable[[BaseTunerLayer], nn.Module],
) -> Tensor:
    source = merge_once(layer) if isinstance(layer, BaseTunerLayer) and _pending(layer) else _base_of(layer)
    if attribute == "weight" and is_quantised(source):
        return dequantised_weight(source).detach().to(dtype)
    return getattr(source, attribute).detach().to(dtype)


def _pending(layer: BaseTunerLayer) -> list[str]:
    """Adapters that the forward adds to the base weight: the active ones that are not in it already."""
    active = [] if layer.disable_adapters else layer.active_adapters
    return [name for name in active if name not in layer.merged_adapters]


def _merged_layer(layer: BaseTunerLayer) -> nn.Module:
    """The base of one adapted layer with its adapters in it, in float32, as a copy."""
    mergeable = isinstance(layer, lora.LoraLayer | TrainableTokensLayer)
    if not mergeable or isinstance(layer, MultiheadAttention | ParamWrapper):
        raise ModelError(f"Adapters of the kind {type(layer).__name__} cannot be merged while the model stays in use.")
    base = layer.get_base_layer()
    dense = _dense_copy(base)
    # PEFT's own merge, on a twin: a deep copy that finds `dense` where the layer has its base.
    twin = cast(BaseTunerLayer, copy.deepcopy(layer, {id(base): dense}).float())
    if is_quantised(base):
        # The twin's base is dense now; the classes for quantised bases would quantise the sum again.
        twin.__class__ = lora.Linear
    with torch.no_grad():
        twin.merge(adapter_names=_pending(layer))
    return twin.get_base_layer()


def _dense_copy(base: nn.Module) -> nn.Module:
    """A float32 copy of a layer, dense where the layer is quantised."""
    if not is_quantised(base):
        return copy.deepcopy(base).float()
    # On the meta device nothing is initialised, and the program's random state stays where it was.
    dense = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    dense.weight = nn.Parameter(dequantised_weight(base), requires_grad=False)
    if base.bias is not None:
        dense.bias = nn.Parameter(base.bias.detach().float(), requires_grad=False)
    return dense
