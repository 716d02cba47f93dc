"""PEFT's LoRA layers computed in few matrix products; PEFT keeps the weights, the names, the files and the merge.

A swap is `module.__class__ = FusedLoraLinear`: undone by assigning PEFT's class again. What this class does not compute
(adapters that are off, merged, several, with dropout, DoRA; a quantised base) goes to PEFT's own forward, call by call.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from embtune.kernels.low_rank import LowRankLinear, low_rank_linears
from embtune.models.shared_input import SIBLINGS, SharedInput


class FusedLoraLinear(Linear):
    """PEFT's LoRA layer around an `nn.Linear`."""

    siblings: SharedInput | None = None
    """The layers that share its input, itself among them."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., C] to [..., D], as PEFT's own."""
        if args or kwargs or not self.is_fusable(x):
            return super().forward(x, *args, **kwargs)
        # Compiled code cannot follow outputs kept for later.
        if self.siblings is not None and not torch.compiler.is_compiling():
            members: list[Any] = self.siblings.members
            output = self.siblings.take(self, x, lambda states: _together(states, members))
            if output is not None:
                return output
        return _compute(x, [self.adapted()])[0]

    def is_fusable(self, x: Tensor) -> bool:
        """Whether the layer in its present state, and for this input, is one that the fused product computes."""
        return (
            self.is_plain(training=self.training)
            and x.dim() > 1
            and x.dtype == self.base_layer.weight.dtype
            and not torch.is_autocast_enabled(x.device.type)
        )

    def is_plain(self, training: bool) -> bool:
        """Whether the layer in its present state is one frozen dense product and one low-rank product."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        [name] = self.active_adapters
        base = self.base_layer
        return (
            name in self.lora_A
            and name not in self.lora_variant
            and not self.lora_bias[name]
            and not self.fan_in_fan_out
            and (isinstance(self.lora_dropout[name], nn.Identity) or not training)
            and type(base) is nn.Linear
            and type(base.weight) is nn.Parameter
            and not base.weight.requires_grad
            and (base.bias is None or not base.bias.requires_grad)
        )

    def adapted(self) -> LowRankLinear:
        """The layer's tensors, those of its one active adapter among them."""
        [name] = self.active_adapters
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return LowRankLinear(self.base_layer.weight, self.base_layer.bias, a, b, float(self.scaling[name]))


def _together(states: Tensor, members: list["FusedLoraLinear"]) -> list[Tensor] | None:
    if not all(each.is_fusable(states) for each in members):
        return None
    return _compute(states, [each.adapted() for each in members])


def _compute(states: Tensor, layers: list[LowRankLinear]) -> list[Tensor]:
    outputs = low_rank_linears(states.flatten(0, -2), layers)
    return [output.unflatten(0, states.shape[:-1]) for output in outputs]


def fuse_lora(backbone: nn.Module) -> list[str]:
    """Let PEFT's LoRA layers of a backbone compute in few products; returns the names of the layers changed."""
    changed = []
    for name, module in backbone.named_modules():
        if type(module) is Linear:
            module.__class__ = FusedLoraLinear
            changed.append(name)
    for module in backbone.modules():
        for names in SIBLINGS:
            found = [getattr(module, name, None) for name in names]
            members = [member for member in found if isinstance(member, FusedLoraLinear)]
            if len(members) == len(names):
                group = SharedInput(members)
                for member in members:
                    member.siblings = group
    return changed


def unfuse_lora(backbone: nn.Module) -> None:
    """Give the layers back to PEFT's own forward."""
    for module in backbone.modules():
        if type(module) is FusedLoraLinear:
            module.__dict__.pop("siblings", None)
            module.__class__ = Linear


def trains_only_fused_layers(backbone: nn.Module) -> bool:
    """Whether everything that is trained in a backbone belongs to adapters that compute in the base's own dtype."""
    fused = [module for module in backbone.modules() if type(module) is FusedLoraLinear]
    plain = [module for module in fused if module.is_plain(training=True)]
    known = {id(parameter) for module in plain for parameter in module.parameters()}
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    return bool(trained) and all(id(parameter) in known for parameter in trained)
