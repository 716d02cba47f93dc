"""The gated product of a feed-forward layer, act(gate) · up, in one kernel each way, and the same in plain PyTorch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from embtune.errors import ArgumentError
from embtune.kernels.tiles import check_dtypes
from embtune.runtime import require_triton

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
"""The activations that the kernels know, as PyTorch computes them; `gelu` is the exact one."""

# Four short pieces of rows a program: widths such as 1,152 leave little of the last piece empty.
_ROWS, _BLOCK = 4, 256


def plain_gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The plain twin of `gated`."""
    return ACTIVATIONS[activation](gate) * up


def plain_gated_halves(gate_up: Tensor, activation: str) -> Tensor:
    """The plain twin of `gated_halves`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return plain_gated(gate, up, activation)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) · up (Shazeer 2020: SwiGLU, GEGLU), on Triton, in float32 and rounded once.

    The backward pass keeps `gate` and `up` and computes the activation again.

    Args:
        gate: float32, bfloat16 or float16, [..., C].
        up: of the same shape.
        activation: `silu`, `gelu` (the exact one) or `gelu_tanh`.

    Returns:
        [..., C] in the dtype that PyTorch gives a product of the two.

    Raises:
        ArgumentError: another dtype, an activation of another name, shapes that differ, or a device that Triton does
            not serve.
        MissingPackageError: triton is not installed.
    """
    _check(activation, gate, up)
    if gate.shape != up.shape:
        raise ArgumentError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape.")
    return _Gated.apply(_rows(gate), _rows(up), activation).view(gate.shape)


def gated_halves(gate_up: Tensor, activation: str) -> Tensor:
    """`gated` where one matrix holds both: act(left half) · right half (ModernBERT), with one gradient for it.

    Args:
        gate_up: float32, bfloat16 or float16, [..., 2 C].
        activation: `silu`, `gelu` (the exact one) or `gelu_tanh`.

    Returns:
        [..., C] in the dtype of `gate_up`.

    Raises:
        ArgumentError: another dtype, an activation of another name, a last axis that cannot be halved, or a device
            that Triton does not serve.
        MissingPackageError: triton is not installed.
    """
    _check(activation, gate_up)
    if gate_up.shape[-1] % 2:
        raise ArgumentError(f"the last axis of {tuple(gate_up.shape)} cannot be halved into gate and up.")
    out = _GatedHalves.apply(_rows(gate_up), activation)
    return out.view(*gate_up.shape[:-1], out.shape[-1])


def _check(activation: str, *states: Tensor) -> None:
    require_triton(states[0].device, "gated")
    check_dtypes("gated", *states)
    if activation not in ACTIVATIONS:
        raise ArgumentError(f"activation={activation!r} is not known; use one of {', '.join(ACTIVATIONS)}.")


def _rows(states: Tensor) -> Tensor:
    # Rows may lie apart (a slice of a fused product); only within a row numbers must follow one another.
    rows = states.reshape(-1, states.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _grid(rows: int, columns: int) -> tuple[int, int]:
    return -(-rows // _ROWS), -(-columns // _BLOCK)


def _forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    from embtune.kernels.gated_triton import gated_forward

    rows, columns = gate.shape
    out = gate.new_empty(rows, columns, dtype=torch.promote_types(gate.dtype, up.dtype))
    with torch.cuda.device_of(gate):
        gated_forward[_grid(rows, columns)](
            gate, up, out, rows, columns, gate.stride(0), up.stride(0), ACTIVATION=activation, R=_ROWS, BLOCK=_BLOCK
        )
    return out


def _backward(grad: Tensor, gate: Tensor, up: Tensor, gate_grad: Tensor, up_grad: Tensor, activation: str) -> None:
    from embtune.kernels.gated_triton import gated_backward

    rows, columns = gate.shape
    with torch.cuda.device_of(gate):
        gated_backward[_grid(rows, columns)](
            grad.contiguous(),
            gate,
            up,
            gate_grad,
            up_grad,
            rows,
            columns,
            gate.stride(0),
            up.stride(0),
            gate_grad.stride(0),
            ACTIVATION=activation,
            R=_ROWS,
            BLOCK=_BLOCK,
        )


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _forward(gate, up, activation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        gate_grad, up_grad = gate.new_empty(gate.shape), up.new_empty(up.shape)
        _backward(grad, gate, up, gate_grad, up_grad, ctx.activation)
        return gate_grad, up_grad, None


class _GatedHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        gate, up = gate_up.chunk(2, dim=1)
        return _forward(gate, up, activation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        gate_up_grad = gate_up.new_empty(gate_up.shape)
        (gate, up), (gate_grad, up_grad) = gate_up.chunk(2, dim=1), gate_up_grad.chunk(2, dim=1)
        _backward(grad, gate, up, gate_grad, up_grad, ctx.activation)
        return gate_up_grad, None
