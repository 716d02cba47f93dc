"""Gradient checkpointing that keeps what was dear to compute and computes again what was cheap.

Results of matrix products and of attention are kept; norms, activation functions, dropout and sums, which take much of
the memory and little of the time, are made again in the backward pass (after Korthikanti et al., arXiv:2205.05198).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts

from embtune.kernels.low_rank import ADAPTED_LINEAR
from embtune.kernels.row_attention import ROW_ATTENTION

_ops = torch.ops.aten

_DEAR = frozenset(
    {
        _ops.mm.default,
        _ops.addmm.default,
        _ops.bmm.default,
        _ops.baddbmm.default,
        _ops._flash_attention_forward.default,
        _ops._scaled_dot_product_flash_attention.default,
        _ops._scaled_dot_product_flash_attention_for_cpu.default,
        _ops._scaled_dot_product_efficient_attention.default,
        _ops._scaled_dot_product_cudnn_attention.default,
        ROW_ATTENTION,
        ADAPTED_LINEAR,
    }
)


def _policy(_: SelectiveCheckpointContext, operation: Any, *args: Any, **settings: Any) -> CheckpointPolicy:
    # What a GPU drew is kept: its random state cannot be read while a CUDA graph is recorded.
    draws = torch.Tag.nondeterministic_seeded in operation.tags
    kept = operation in _DEAR or (draws and _device(args, settings).type != "cpu")
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _device(args: tuple[Any, ...], settings: dict[str, Any]) -> torch.device:
    """Where an operation draws: where its input is, or where it was told to."""
    if args and isinstance(args[0], Tensor):
        return args[0].device
    return torch.device(settings.get("device") or "cpu")


def selective_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What `torch.utils.checkpoint` is to compute forward and again in; call with `preserve_rng_state=False`."""
    keep, again = create_selective_checkpoint_contexts(_policy)
    return keep, _with_randomness(again, torch.get_rng_state())


@contextmanager
def _with_randomness(again: AbstractContextManager[None], state: Tensor) -> Iterator[None]:
    """Draw on the CPU what the forward pass drew."""
    with torch.random.fork_rng(devices=[]), again:
        torch.set_rng_state(state)
        yield
