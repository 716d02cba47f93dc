"""How the kernels of `row_attention` are launched: their tiles, their grids and their arguments."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from embtune.kernels.row_attention_plain import dropout_threshold

# Farther than any token of a row, and far from the end of int32.
_EVERYWHERE = 2**30


@dataclass(frozen=True)
class AttentionTile:
    """How a kernel cuts up the table of scores."""

    queries: int
    """Rows of scores at a time, a power of two ≥ 16."""
    keys: int
    """Columns of scores at a time, a power of two ≥ 16."""
    warps: int = 4
    """Warps that share a tile."""
    stages: int = 2
    """How many tiles are under way from memory at a time."""


@dataclass(frozen=True)
class AttentionTiles:
    """The tile of each kernel."""

    attend: AttentionTile
    """Forward: a program keeps its queries and walks over keys."""
    query_gradients: AttentionTile
    """Backward: the same."""
    key_value_gradients: AttentionTile
    """Backward: a program keeps its keys and walks over queries."""


def choose_tiles(head_dim: int, dtype: torch.dtype) -> AttentionTiles:
    """Tiles whose scores and sums fit in registers, and in the shared memory of GPUs that have 99 KiB of it."""
    if dtype == torch.float32:
        return AttentionTiles(*[AttentionTile(32, 32) if head_dim <= 64 else AttentionTile(16, 16)] * 3)
    if head_dim <= 64:
        # The fastest on an H200, for texts of 15 to 460 tokens (benchmarks/row_attention.py).
        queries = AttentionTile(64, 32, stages=3)
        return AttentionTiles(queries, queries, AttentionTile(32, 64, stages=3))
    if head_dim <= 128:
        return AttentionTiles(AttentionTile(64, 32, stages=3), AttentionTile(64, 32), AttentionTile(32, 64))
    return AttentionTiles(*[AttentionTile(32, 32)] * 3)


@dataclass(frozen=True)
class RowAttention:
    """One row's attention as the three kernels take it: they fill tensors of any strides whose last is 1."""

    tiles: AttentionTiles
    q_THD: Tensor
    k_TGD: Tensor
    v_TGD: Tensor
    starts_T: Tensor
    ends_T: Tensor
    bias_HR: Tensor | None
    """Contiguous."""
    seed: Tensor | None
    """None without dropout."""
    scale: float
    before: int
    """How many tokens before itself a token reads, -1 for all."""
    after: int
    """How many after itself, likewise."""
    dropout: float

    def attend(self, out_THD: Tensor, lse_HT: Tensor) -> None:
        """Fill the output, and log2 of each query's sum of 2^(score · log2 e): float32, contiguous."""
        from embtune.kernels.row_attention_triton import attend

        self._launch(attend, self.tiles.attend, self._heads, (out_THD, lse_HT), (out_THD,))

    def query_gradients(
        self,
        out_THD: Tensor,
        out_grad_THD: Tensor,
        lse_HT: Tensor,
        delta_HT: Tensor,
        q_grad_THD: Tensor,
        bias_grad_HR: Tensor | None = None,
    ) -> None:
        """Fill `delta_HT` (float32, contiguous), which `key_value_gradients` reads, and the queries' gradient.

        Adds to `bias_grad_HR` (float32, contiguous).
        """
        from embtune.kernels.row_attention_triton import query_gradients

        tensors = (out_THD, out_grad_THD, lse_HT, delta_HT, q_grad_THD, bias_grad_HR)
        strided = (out_THD, out_grad_THD, q_grad_THD)
        self._launch(query_gradients, self.tiles.query_gradients, self._heads, tensors, strided)

    def key_value_gradients(
        self, out_grad_THD: Tensor, lse_HT: Tensor, delta_HT: Tensor, k_grad_TGD: Tensor, v_grad_TGD: Tensor
    ) -> None:
        """Fill the gradients of keys and values."""
        from embtune.kernels.row_attention_triton import key_value_gradients

        tensors = (out_grad_THD, lse_HT, delta_HT, k_grad_TGD, v_grad_TGD)
        strided = (out_grad_THD, k_grad_TGD, v_grad_TGD)
        tile = self.tiles.key_value_gradients
        self._launch(key_value_gradients, tile, self.k_TGD.shape[1], tensors, strided, by_keys=True)

    @property
    def _heads(self) -> int:
        return self.q_THD.shape[1]

    def _launch(
        self,
        kernel: Any,
        tile: AttentionTile,
        heads: int,
        tensors: tuple[Tensor | None, ...],
        strided: tuple[Tensor, ...],
        by_keys: bool = False,
    ) -> None:
        tokens, _, head_dim = self.q_THD.shape
        rows = tile.keys if by_keys else tile.queries
        # Heads first: programs at work together then read whole rows of memory, and the same texts.
        grid = (heads, -(-tokens // rows))
        with torch.cuda.device_of(self.q_THD):
            kernel[grid](
                self.q_THD,
                self.k_TGD,
                self.v_TGD,
                self.starts_T,
                self.ends_T,
                self.bias_HR,
                self.seed,
                tokens,
                _EVERYWHERE if self.before < 0 else self.before,
                _EVERYWHERE if self.after < 0 else self.after,
                0 if self.bias_HR is None else self.bias_HR.shape[1],
                self.scale,
                dropout_threshold(self.dropout),
                1 / (1 - self.dropout),
                *_strides(self.q_THD, self.k_TGD, self.v_TGD),
                *tensors,
                *_strides(*strided),
                GROUP=self._heads // self.k_TGD.shape[1],
                D=head_dim,
                BLOCK=max(16, 1 << (head_dim - 1).bit_length()),
                QUERIES=tile.queries,
                KEYS=tile.keys,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]
