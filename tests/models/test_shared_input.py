"""Layers that share their input."""

import torch
from torch import nn

from embtune.models.shared_input import SharedInput


def test_outputs_for_the_input_of_another_thread_are_never_handed_out() -> None:
    first, second = nn.Identity(), nn.Identity()
    shared = SharedInput([first, second])

    def multiples(states: torch.Tensor) -> list[torch.Tensor]:
        return [2 * states, 3 * states]

    theirs, ours = torch.tensor(10.0), torch.tensor(1.0)

    class Old:
        def __del__(self) -> None:  # in the middle of `take`, as another thread may be
            shared.take(first, theirs, multiples)

    shared.take(first, Old(), lambda _: [ours, ours])  # type: ignore[arg-type]
    assert shared.take(first, ours, multiples) == 2
    assert shared.take(second, theirs, multiples) == 30
    assert shared.take(second, ours, multiples) == 3
