"""The weights that autocast rounds in each pass, one kernel for each, rounded by a few kernels for all of them."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import Tensor, nn
from torch.func import functional_call

from embtune.models.checkpointing import is_selective, recomputes_layers


def can_round(backbone: nn.Module) -> bool:
    """Whether a pass of this backbone may find rounded copies where its linear layers have their weights.

    Adapters and quantised layers look for parameters; layers that are recomputed in the backward pass would find the
    weights as they are.
    """
    return (
        all(weight.dtype == torch.float32 for weight in backbone.parameters())
        and not (recomputes_layers(backbone) or is_selective(backbone))
        and not any(isinstance(module, BaseTunerLayer) for module in backbone.modules())
    )


def call_rounded(transformer: Transformer, dtype: torch.dtype, features: dict[str, Any]) -> dict[str, Any]:
    """The module's own pass, with the weights of its linear layers rounded to `dtype`; differentiable in all weights.

    Under autocast to the same dtype this is what the module computes by itself.
    """
    named = {
        f"{name}.{kind}": weight
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
        for kind, weight in module.named_parameters(recurse=False)
    }
    rounded = dict(zip(named, _Round.apply(dtype, *named.values()), strict=True))
    # An embedding that shares its weight with a linear layer is not rounded by autocast either.
    return functional_call(transformer, rounded, (features,), tie_weights=False)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        rounded = _cast(weights, dtype)
        # Otherwise all of them would have gradients computed, frozen ones too.
        ctx.mark_non_differentiable(
            *(copy for copy, trained in zip(rounded, ctx.needs_input_grad[1:], strict=True) if not trained)
        )
        return tuple(rounded)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ARG004
        found = iter(_cast([gradient for gradient in grads if gradient is not None], torch.float32))
        return None, *(None if gradient is None else next(found) for gradient in grads)


def _cast(tensors: tuple[Tensor, ...] | list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    made = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if made:
        torch._foreach_copy_(made, list(tensors))
    return made
