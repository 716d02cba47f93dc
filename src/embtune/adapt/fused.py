"""PEFT's LoRA layers computed in few matrix products; PEFT keeps the weights, the names, the files and the merge.

A swap is `module.__class__ = FusedLoraLinear`: undone by assigning PEFT's class again. What this class does not compute
(adapters that are off, merged, several, with dropout, DoRA; a quantised base) goes to PEFT's own forward, call by call.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from embtune.kernels.low_rank import LowRankLinear, low_rank_linears

# Linear layers of one module that read the same input, by the names that transformers' encoders give them.
_SIBLINGS = (
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
)


class Siblings:
    """Layers that are called one after another with the same input: the first computes for all of them."""

    def __init__(self, members: list["FusedLoraLinear"]) -> None:
        self.members = members
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or a pickle, of a model has no call under way.
        return {"members": self.members, "_input": None, "_outputs": {}}

    def output(self, member: "FusedLoraLinear", states: Tensor) -> Tensor:
        """What `member` makes of `states`: computed before, when another was called with the same tensor, or now."""
        place = next((index for index, each in enumerate(self.members) if each is member), None)
        if place is None:  # a replica that nn.DataParallel made
            return _compute(states, [member.adapted()])[0]
        if self._input is not states or place not in self._outputs:
            if not all(each.is_fusable(states) for each in self.members):
                return _compute(states, [member.adapted()])[0]
            outputs = _compute(states, [each.adapted() for each in self.members])
            self._input, self._outputs = states, dict(enumerate(outputs))
        output = self._outputs.pop(place)
        if not self._outputs:
            self._input = None
        return output


class FusedLoraLinear(Linear):
    """PEFT's LoRA layer around an `nn.Linear`."""

    siblings: Siblings | None = None
    """The layers that share its input, itself among them."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., C] to [..., D], as PEFT's own."""
        if args or kwargs or not self.is_fusable(x):
            return super().forward(x, *args, **kwargs)
        # Compiled code cannot follow outputs kept for later.
        if self.siblings is None or torch.compiler.is_compiling():
            return _compute(x, [self.adapted()])[0]
        return self.siblings.output(self, x)

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
        for names in _SIBLINGS:
            found = [getattr(module, name, None) for name in names]
            members = [member for member in found if isinstance(member, FusedLoraLinear)]
            if len(members) == len(names):
                group = Siblings(members)
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
