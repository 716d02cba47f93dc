"""Layers that are called one after another with the same input, such as those of queries, keys and values.

The first computes for all of them, and keeps what the others have not asked for yet.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SIBLINGS = (
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
)
"""Linear layers of one module that read the same input, by the names that transformers' encoders give them."""


class SharedInput:
    """The layers that share their input, and their outputs for one input until each is taken."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        self.members = list(members)
        # Both in one attribute: another thread's input never goes with this one's outputs.
        self._held: tuple[Tensor, dict[int, Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or a pickle, of a model has no call under way.
        return {"members": self.members, "_held": None}

    def take(
        self, member: nn.Module, states: Tensor, compute: Callable[[Tensor], Sequence[Tensor] | None]
    ) -> Tensor | None:
        """The part of `compute(states)` that is this member's, in their order; None where it has to do without.

        Computed before, when another member was called with the same tensor, or now.
        """
        place = next((index for index, each in enumerate(self.members) if each is member), None)
        if place is None:  # a replica that nn.DataParallel made
            return None
        held = self._held
        if held is None or held[0] is not states or place not in held[1]:
            outputs = compute(states)
            if outputs is None:
                return None
            held = self._held = states, dict(enumerate(outputs))
        output = held[1].pop(place)
        if not held[1]:
            self._held = None
        return output


class SharedCastLinear(nn.Linear):
    """One of several linear layers whose common float32 input autocast would round for each anew."""

    shared: SharedInput

    def forward(self, input: Tensor) -> Tensor:
        """[..., C] to [..., D], as `nn.Linear`."""
        rounded = None
        if _is_rounded_by_autocast(input):
            rounded = self.shared.take(self, input, self._round)
        return super().forward(input if rounded is None else rounded)

    def _round(self, states: Tensor) -> tuple[Tensor, ...]:
        return _CastOnce.apply(states, torch.get_autocast_dtype(states.device.type), len(self.shared.members))


def _is_rounded_by_autocast(states: Tensor) -> bool:
    # Compiled or traced code cannot follow outputs kept for later.
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return states.dtype == torch.float32 and not traced and torch.is_autocast_enabled(states.device.type)


class _CastOnce(torch.autograd.Function):
    """The same states for several readers, rounded once; their gradients are added in float32, as without sharing."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, dtype: torch.dtype, count: int) -> tuple[Tensor, ...]:  # noqa: ARG004
        rounded = states.to(dtype)
        return tuple(rounded.detach() for _ in range(count))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, first: Tensor, *others: Tensor) -> tuple[Tensor, None, None]:  # noqa: ARG004
        total = first.float()
        for gradient in others:
            total.add_(gradient)
        return total, None, None


def share_casts(backbone: nn.Module) -> list[str]:
    """Let sibling linear layers of a backbone round a float32 input once under autocast; returns the layers changed.

    Layers of other classes, adapters and quantised ones among them, are left as they are.
    """
    changed = []
    for parent, module in backbone.named_modules():
        for names in SIBLINGS:
            members: list[Any] = [getattr(module, name, None) for name in names]
            if all(type(member) is nn.Linear and "forward" not in vars(member) for member in members):
                shared = SharedInput(members)
                for member in members:
                    member.__class__ = SharedCastLinear
                    member.shared = shared
                changed += [f"{parent}.{name}" for name in names]
    return changed


def unshare_casts(backbone: nn.Module) -> None:
    """Give the layers their own class back."""
    for module in backbone.modules():
        if type(module) is SharedCastLinear:
            del module.shared
            module.__class__ = nn.Linear
