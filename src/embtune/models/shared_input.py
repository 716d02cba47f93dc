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
        # All in one attribute: another thread's input never goes with this one's outputs.
        self._held: tuple[Tensor, bool, dict[int, Tensor]] | None = None
        """The input, whether gradients were asked for, and the outputs that are left."""

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or a pickle, of a model has no call under way.
        return {**vars(self), "_held": None}

    def take(
        self, member: nn.Module, states: Tensor, compute: Callable[[Tensor], Sequence[Tensor] | None]
    ) -> Tensor | None:
        """The part of `compute(states)` that is this member's, in their order; None where it has to do without.

        Computed before, when another member was called with the same tensor, or now.
        """
        place = next((index for index, each in enumerate(self.members) if each is member), None)
        if place is None:  # a replica that nn.DataParallel made
            return None
        held, for_gradients = self._held, torch.is_grad_enabled()
        if held is None or held[0] is not states or held[1] != for_gradients or place not in held[2]:
            outputs = compute(states)
            if outputs is None:
                return None
            held = self._held = states, for_gradients, dict(enumerate(outputs))
        output = held[2].pop(place)
        if not held[2]:
            self._held = None
        return output
