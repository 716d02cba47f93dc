"""When a fused module may use its kernels; wherever it may not, it takes the original's way."""

import torch
from torch import Tensor, nn

from embtune.kernels.tiles import DTYPES, MAX_COLUMNS
from embtune.runtime import runs_triton

_HALF = (torch.bfloat16, torch.float16)


def serve(states: Tensor) -> bool:
    """Whether the kernels take these states here and now."""
    # Compilers fuse these operations themselves, and cannot look into the kernels.
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not traced and states.dtype in DTYPES and runs_triton(states.device)


def is_own(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether a module is of one of these exact classes and nobody watches or replaces its forward.

    The kernels take such a module's numbers without calling it, which would skip hooks and a forward on the instance.
    """
    watched = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) in classes and not watched and "forward" not in vars(module)


def is_plain_norm(norm: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether a norm of one of these exact classes has a weight [D] that the kernels take."""
    weight = getattr(norm, "weight", None)
    return (
        is_own(norm, *classes)
        and isinstance(weight, Tensor)
        and weight.ndim == 1
        and weight.dtype in DTYPES
        and len(weight) <= MAX_COLUMNS
    )


def is_half(states: Tensor) -> bool:
    """Whether states, or a weight, are in half precision and nobody else decides what is computed in float32."""
    return states.dtype in _HALF and not torch.is_autocast_enabled(states.device.type)


def is_whole(backbone: nn.Module, swaps: dict[type[nn.Module], type[nn.Module]]) -> bool:
    """Whether every module that `swaps` is about can be, or has been, swapped, subclasses by others included."""
    members = [module for module in backbone.modules() if isinstance(module, tuple(swaps))]
    known = {*swaps, *swaps.values()}
    return all(type(module) in known and "forward" not in vars(module) for module in members)
