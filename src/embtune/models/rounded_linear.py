"""Linear layers that autocast would round anew, with their input, in each pass: rounded and computed together.

A swap is `module.__class__ = RoundedLinear`; whatever is not under autocast goes to `nn.Linear`'s own forward.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from embtune.kernels.rounded import rounded_linears
from embtune.models.checkpointing import is_selective
from embtune.models.shared_input import SIBLINGS, SharedInput


class RoundedLinears(SharedInput):
    """Linear layers that share their input, and perhaps copies of their weights in half precision."""

    def __init__(self, members: Sequence[nn.Linear]) -> None:
        super().__init__(members)
        self.rounded: tuple[Tensor, Tensor | None] | None = None
        """Weights [D, C] and biases [D] of all layers, below each other, for the pass that is under way."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rounded": None}

    def parts(self) -> list[list[Tensor]]:
        """The weights of all layers, and their biases."""
        return [[part for part in parts if part is not None] for parts in self._parameters()]

    def compute(self, states: Tensor) -> list[Tensor] | None:
        """The outputs [..., D_i] for an input [..., C] under autocast; None if the layers cannot be joined now."""
        weights, biases = self.parts()
        # A hook may set a sibling's weights before its own forward, or change an output in place.
        if any(member._forward_pre_hooks or member._forward_hooks for member in self.members):
            return None
        if len(biases) not in (0, len(weights)) or not all(map(_is_exact, weights + biases)):
            return None
        if self.rounded is None:
            dtype = torch.get_autocast_dtype(states.device.type)
            weight, bias = (_joined(parts, dtype) for parts in (weights, biases))
        else:
            weight, bias = self.rounded
        assert weight is not None
        outputs = rounded_linears(states.flatten(0, -2), weight, bias, weights, biases)
        return [output.unflatten(0, states.shape[:-1]) for output in outputs]

    def _parameters(self) -> Iterator[list[Tensor | None]]:
        yield [member.weight for member in self.members]
        yield [member.bias for member in self.members]


class RoundedLinear(nn.Linear):
    """A linear layer in float32 whose product is computed, under autocast, with those of its siblings."""

    shared: RoundedLinears

    def forward(self, input: Tensor) -> Tensor:
        """[..., C] to [..., D], as `nn.Linear`."""
        output = self.shared.take(self, input, self.shared.compute) if _is_rounded_by_autocast(input) else None
        return super().forward(input) if output is None else output


def _is_rounded_by_autocast(states: Tensor) -> bool:
    device = states.device.type
    # Without gradients autocast does no more than this, and keeps what it rounds for the next call.
    if not torch.is_grad_enabled() or not torch.amp.is_autocast_available(device):
        return False
    # Compiled or traced code cannot follow outputs kept for later.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not torch.is_autocast_enabled(device):
        return False
    return states.dim() > 1 and states.dtype in (torch.float32, torch.get_autocast_dtype(device))


def _is_exact(part: Tensor) -> bool:
    # A quantised weight is a parameter of another class, or holds another tensor.
    return type(part) is nn.Parameter and part.dtype == torch.float32


@torch.no_grad()
def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    if not parts:
        return None
    return parts[0].to(dtype) if len(parts) == 1 else torch.cat([part.to(dtype) for part in parts])


@contextmanager
def rounded_at_once(backbone: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within it, the weights of all `RoundedLinear` layers are there in `dtype`, rounded by a few kernels for all.

    Not with selective checkpointing, which wants the same operations when it recomputes a layer, behind this context.
    """
    groups = [] if is_selective(backbone) else list(_groups(backbone))
    try:
        with torch.no_grad():
            _round_all(groups, dtype)
        yield
    finally:
        for group in groups:
            group.rounded = None


def _round_all(groups: Iterable[RoundedLinears], dtype: torch.dtype) -> None:
    exact: list[Tensor] = []
    places: list[Tensor] = []
    for group in groups:
        joined = []
        for parts in group.parts():
            sizes = [len(part) for part in parts]
            joint = parts[0].new_empty(sum(sizes), *parts[0].shape[1:], dtype=dtype) if parts else None
            joined.append(joint)
            exact += parts
            places += joint.split(sizes) if joint is not None else []
        group.rounded = joined[0], joined[1]
    if exact:
        torch._foreach_copy_(places, exact)


def _groups(backbone: nn.Module) -> Iterator[RoundedLinears]:
    seen = set()
    for module in backbone.modules():
        if type(module) is RoundedLinear and id(module.shared) not in seen:
            seen.add(id(module.shared))
            yield module.shared


def round_linears(backbone: nn.Module) -> list[str]:
    """Let the linear layers of a backbone without adapters be rounded together; returns the layers changed.

    Layers of other classes are left as they are; so are ALBERT's, which are called again and again: each call would
    keep rounded weights, where autocast keeps them once.
    """
    adapted = any(isinstance(module, BaseTunerLayer) for module in backbone.modules())
    if adapted or getattr(backbone.config, "num_hidden_groups", None) is not None:
        return []
    for module in backbone.modules():
        for names in SIBLINGS:
            members: list[Any] = [getattr(module, name, None) for name in names]
            if all(map(_is_plain, members)) and len({member.in_features for member in members}) == 1:
                _share(members)
    for module in backbone.modules():
        if _is_plain(module):
            _share([module])
    return [name for name, module in backbone.named_modules() if type(module) is RoundedLinear]


def _is_plain(module: nn.Module | None) -> bool:
    return type(module) is nn.Linear and "forward" not in vars(module)


def _share(members: Sequence[nn.Module]) -> None:
    shared = RoundedLinears(members)
    for member in members:
        member.__class__ = RoundedLinear
        member.shared = shared


def unround_linears(backbone: nn.Module) -> None:
    """Give the layers their own class back."""
    for module in backbone.modules():
        if type(module) is RoundedLinear:
            del module.shared
            module.__class__ = nn.Linear
