"""Rotary position embeddings in one kernel each way, and the same in plain PyTorch.

Su et al. 2021, arXiv:2104.09864, in the order of transformers: a head's number i turns with number i + D / 2.

T tokens, H query heads, G key heads, D numbers a head, P rows of cosines, which divide T: row t % P belongs to token t.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from embtune.errors import ArgumentError
from embtune.kernels.tiles import check_dtypes
from embtune.runtime import require_triton

MAX_HEAD_DIM = 512
"""The largest head that a tile holds."""

# Numbers of each half that a program turns at once, so that each lane holds 16 bytes of bfloat16 of both.
_TILE = 1024
_MOST_HEADS = 16


def plain_rotate(q_THD: Tensor, k_TGD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The plain twin of `rotate`; float64 stays float64."""
    return _plain_turn(q_THD, cos, sin), _plain_turn(k_TGD, cos, sin)


def plain_rotate_joined(qkv_T3HD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The plain twin of `rotate_joined`."""
    q_THD, k_THD, v_THD = qkv_T3HD.unbind(1)
    return *plain_rotate(q_THD, k_THD, cos, sin), v_THD


def _plain_turn(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide_THD = x_THD.to(torch.promote_types(x_THD.dtype, torch.float32))
    times = x_THD.shape[0] // cos.flatten(0, -2).shape[0]
    cos_T1D, sin_T1D = (part.flatten(0, -2).to(wide_THD.dtype).repeat(times, 1)[:, None] for part in (cos, sin))
    left, right = wide_THD.chunk(2, dim=-1)
    return (wide_THD * cos_T1D + torch.cat((-right, left), dim=-1) * sin_T1D).to(x_THD.dtype)


def rotate(q_THD: Tensor, k_TGD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions, on Triton, in float32 and rounded once.

    Args:
        q_THD: float32, bfloat16 or float16; tokens and heads may lie apart, as in slices of one projection.
        k_TGD: the same with its own number of heads.
        cos: cosines [..., D], P rows in all, whose two halves are equal: the first is read. They get no gradient.
        sin: the sines, likewise.

    Returns:
        Queries and keys, contiguous, in their own dtypes.

    Raises:
        ArgumentError: another dtype, shapes that do not fit, D odd or over 512, or a device that Triton does not serve.
        MissingPackageError: triton is not installed.
    """
    check_heads(q_THD, k_TGD, cos, sin)
    return _Rotate.apply(q_THD, k_TGD, as_table(cos), as_table(sin))


def rotate_joined(qkv_T3HD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`rotate` where one projection holds queries, keys and values (ModernBERT), with one gradient for it.

    Values are copied: a view would keep all of the projection, unturned queries and keys too, for the backward pass.

    Args:
        qkv_T3HD: float32, bfloat16 or float16.
        cos: as `rotate` takes it.
        sin: likewise.

    Returns:
        Queries, keys and values [T, H, D], slices of one [T, 3, H, D].

    Raises:
        ArgumentError: another dtype, shapes that do not fit, D odd or over 512, or a device that Triton does not serve.
        MissingPackageError: triton is not installed.
    """
    if qkv_T3HD.ndim != 4 or qkv_T3HD.shape[1] != 3:
        raise ArgumentError(f"qkv {tuple(qkv_T3HD.shape)}: expected queries, keys and values in one [T, 3, H, D].")
    check_heads(qkv_T3HD[:, 0], qkv_T3HD[:, 1], cos, sin)
    return _RotateJoined.apply(qkv_T3HD, as_table(cos), as_table(sin))


def check_heads(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Refuse what the kernels cannot turn, as `rotate` says."""
    require_triton(q.device, "rotate")
    check_dtypes("rotate", q, k, cos, sin)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
    if q.ndim != 3 or k.ndim != 3 or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]):
        raise ArgumentError(f"{shapes}: expected q [T, H, D] and k [T, G, D].")
    if q.shape[2] % 2 or not 2 <= q.shape[2] <= MAX_HEAD_DIM:
        raise ArgumentError(f"{shapes}: a head must hold an even number of numbers, at most {MAX_HEAD_DIM}.")
    rows = math.prod(cos.shape[:-1])
    if cos.ndim < 2 or cos.shape != sin.shape or cos.shape[-1] != q.shape[2] or not rows or q.shape[0] % rows:
        raise ArgumentError(f"{shapes}: expected cos and sin [..., D] whose rows divide the {q.shape[0]} tokens.")


def as_table(part: Tensor) -> Tensor:
    """Cosines or sines [P, D], contiguous."""
    return part.reshape(-1, part.shape[-1]).contiguous()


@dataclass(frozen=True)
class HeadTile:
    """What one program turns at once: some heads of some tokens."""

    heads: int
    """Heads side by side: a power of two that divides both numbers of heads, so that no place stays empty."""
    rows: int
    """Tokens."""
    half: int
    """Half the numbers of a head."""
    block: int
    """Places for them: a power of two."""

    @classmethod
    def of(cls, q: Tensor, k: Tensor) -> "HeadTile":
        """For q [T, H, D] and k [T, G, D]."""
        half = q.shape[2] // 2
        block = max(16, 1 << (half - 1).bit_length())
        heads = math.gcd(q.shape[1], k.shape[1], _MOST_HEADS)
        return cls(heads, max(1, _TILE // (heads * block)), half, block)


def packed(states: Tensor) -> Tensor:
    """The states with the numbers of a head next to each other."""
    return states if states.stride(-1) == 1 else states.contiguous()


def strides_of(*tensors: Tensor) -> list[int]:
    """How far apart tokens and heads lie, one tensor after the other."""
    return [stride for each in tensors for stride in each.stride()[:2]]


def _launch(parts: Sequence[Tensor], outs: Sequence[Tensor], cos: Tensor, sin: Tensor, *, inverse: bool) -> None:
    """Turn the first two of `parts` into the first two of `outs`; a third is copied."""
    from embtune.kernels.rotary_triton import rotate_heads

    parts = [packed(part) for part in parts]
    tokens, tile = len(parts[0]), HeadTile.of(parts[0], parts[1])
    blocks = [part.shape[1] // tile.heads for part in parts]
    absent = 3 - len(parts)
    with torch.cuda.device_of(parts[0]):
        rotate_heads[(-(-tokens // tile.rows) * sum(blocks),)](
            *parts,
            *[None] * absent,
            *outs,
            *[None] * absent,
            cos,
            sin,
            tokens,
            cos.shape[0],
            *strides_of(*(each for pair in zip(parts, outs, strict=True) for each in pair)),
            *[0, 0, 0, 0] * absent,
            INVERSE=inverse,
            Q_BLOCKS=blocks[0],
            K_BLOCKS=blocks[1],
            BLOCKS=sum(blocks),
            HEADS=tile.heads,
            R=tile.rows,
            HALF=tile.half,
            BLOCK=tile.block,
        )


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        outs = q.new_empty(q.shape), k.new_empty(k.shape)
        _launch((q, k), outs, cos, sin, inverse=False)
        return outs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        outs = q_grad.new_empty(q_grad.shape), k_grad.new_empty(k_grad.shape)
        _launch((q_grad, k_grad), outs, *ctx.saved_tensors, inverse=True)
        return *outs, None, None


class _RotateJoined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        outs = qkv.new_empty(qkv.shape).unbind(1)
        _launch(qkv.unbind(1), outs, cos, sin, inverse=False)
        return outs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        tokens, heads, head_dim = grads[0].shape
        qkv_grad = grads[0].new_empty(tokens, 3, heads, head_dim)
        _launch(grads, qkv_grad.unbind(1), *ctx.saved_tensors, inverse=True)
        return qkv_grad, None, None
