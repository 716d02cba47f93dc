"""RMSNorm of each head's queries and keys, then their rotary embeddings: one kernel each way (Qwen3, Gemma 3).

T tokens, H query heads, G key heads, D numbers a head, P rows of cosines, which divide T.
"""

from typing import Any

import torch
from torch import Tensor

from embtune.errors import ArgumentError
from embtune.kernels.add_norm import plain_add_norm
from embtune.kernels.rotary import HeadTile, as_table, check_heads, packed, plain_rotate, strides_of
from embtune.kernels.tiles import check_dtypes


def plain_norm_rotate(
    q_THD: Tensor,
    k_TGD: Tensor,
    q_weight_D: Tensor,
    k_weight_D: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    """The plain twin of `norm_rotate`; float64 stays float64."""
    wide = torch.promote_types(q_THD.dtype, torch.float32)
    normed_q, normed_k = (
        plain_add_norm(states, None, weight, None, eps, "rms", unit_offset, wide)[1]
        for states, weight in ((q_THD, q_weight_D), (k_TGD, k_weight_D))
    )
    turned_q, turned_k = plain_rotate(normed_q, normed_k, cos, sin)
    return turned_q.to(q_THD.dtype), turned_k.to(k_TGD.dtype)


def norm_rotate(
    q_THD: Tensor,
    k_TGD: Tensor,
    q_weight_D: Tensor,
    k_weight_D: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    """Queries and keys, each head normed (RMSNorm) and turned by its position, on Triton, in float32, rounded once.

    The backward pass keeps `q_THD` and `k_TGD` and norms them again.

    Args:
        q_THD: float32, bfloat16 or float16; tokens and heads may lie apart.
        k_TGD: the same with its own number of heads.
        q_weight_D: the scale of all query heads [D].
        k_weight_D: that of all key heads [D].
        eps: added to the mean square.
        cos: cosines [..., D], P rows in all, whose two halves are equal: the first is read. They get no gradient.
        sin: the sines, likewise.
        unit_offset: Gemma's form: the scale is 1 + weight.

    Returns:
        Queries and keys, contiguous, in their own dtypes.

    Raises:
        ArgumentError: another dtype, shapes that do not fit, D odd or over 512, or a device that Triton does not serve.
        MissingPackageError: triton is not installed.
    """
    check_heads(q_THD, k_TGD, cos, sin)
    check_dtypes("norm_rotate", q_weight_D, k_weight_D)
    for name, weight in (("q_weight", q_weight_D), ("k_weight", k_weight_D)):
        if weight.shape != q_THD.shape[2:]:
            raise ArgumentError(f"{name} {tuple(weight.shape)} must be [{q_THD.shape[2]}], the numbers of a head.")
    return _NormRotate.apply(q_THD, k_TGD, q_weight_D, k_weight_D, as_table(cos), as_table(sin), eps, unit_offset)


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        unit_offset: bool,
    ) -> tuple[Tensor, Tensor]:
        from embtune.kernels.norm_rotary_triton import norm_rotate_forward

        q, k, tile = packed(q), packed(k), HeadTile.of(q, k)
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
        ctx.eps, ctx.unit_offset = eps, unit_offset
        q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
        q_blocks, k_blocks = (states.shape[1] // tile.heads for states in (q, k))
        with torch.cuda.device_of(q):
            norm_rotate_forward[(-(-len(q) // tile.rows) * (q_blocks + k_blocks),)](
                q,
                k,
                q_weight.contiguous(),
                k_weight.contiguous(),
                q_out,
                k_out,
                cos,
                sin,
                len(q),
                len(cos),
                *strides_of(q, q_out, k, k_out),
                eps,
                UNIT_OFFSET=unit_offset,
                Q_BLOCKS=q_blocks,
                K_BLOCKS=k_blocks,
                HEADS=tile.heads,
                R=tile.rows,
                HALF=tile.half,
                BLOCK=tile.block,
            )
        return q_out, k_out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, q_out_grad: Tensor, k_out_grad: Tensor) -> tuple[Tensor | None, ...]:
        from embtune.kernels.norm_rotary_triton import norm_rotate_backward

        q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
        q_out_grad, k_out_grad, tile = packed(q_out_grad), packed(k_out_grad), HeadTile.of(q, k)
        q_grad, k_grad = q.new_empty(q.shape), k.new_empty(k.shape)
        q_blocks, k_blocks = (states.shape[1] // tile.heads for states in (q, k))
        tiles, blocks = -(-len(q) // tile.rows), q_blocks + k_blocks
        train = any(ctx.needs_input_grad[2:4])
        parts = q.new_empty(tiles, blocks, q.shape[2], dtype=torch.float32) if train else None
        with torch.cuda.device_of(q):
            norm_rotate_backward[(tiles * blocks,)](
                q_out_grad,
                k_out_grad,
                q,
                k,
                q_weight.contiguous(),
                k_weight.contiguous(),
                q_grad,
                k_grad,
                parts,
                cos,
                sin,
                len(q),
                len(cos),
                *strides_of(q_out_grad, q, q_grad, k_out_grad, k, k_grad),
                ctx.eps,
                UNIT_OFFSET=ctx.unit_offset,
                Q_BLOCKS=q_blocks,
                K_BLOCKS=k_blocks,
                HEADS=tile.heads,
                R=tile.rows,
                HALF=tile.half,
                BLOCK=tile.block,
            )
        weight_grads: list[Tensor | None] = [None, None]
        if parts is not None:
            q_parts, k_parts = parts.split((q_blocks, k_blocks), dim=1)
            weight_grads = [q_parts.sum((0, 1)).to(q_weight.dtype), k_parts.sum((0, 1)).to(k_weight.dtype)]
        return q_grad, k_grad, *weight_grads, None, None, None, None
