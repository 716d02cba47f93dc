"""What the kernels over rows take, and how rows are shared out among the programs of a kernel."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from embtune.errors import ArgumentError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels read and write; they compute in float32."""

MAX_COLUMNS = 8192
"""The longest row that one program holds at once."""

_PROGRAMS = 2048
_TILE = 1024


@dataclass(frozen=True)
class Tile:
    """What one program holds at once: some whole rows, in registers."""

    rows: int
    """Rows side by side."""
    block: int
    """Places for the columns of a row: the next power of two."""
    warps: int
    """Warps that share the work, so that each lane holds 16 bytes of bfloat16 or a few times that."""

    def count(self, rows: int) -> int:
        """How many tiles cover `rows` rows."""
        return -(-rows // self.rows)

    def steps(self, rows: int) -> int:
        """How many tiles each program takes one after the other where sums over rows want few programs.

        A power of two: a kernel is compiled anew for each number.
        """
        return 1 << max(0, -(-self.count(rows) // _PROGRAMS) - 1).bit_length()


@cache
def tile_of(columns: int) -> Tile:
    """The tile for rows of `columns` numbers: several short rows, or one long one.

    Raises:
        ArgumentError: the rows are empty or longer than `MAX_COLUMNS`.
    """
    if not 1 <= columns <= MAX_COLUMNS:
        raise ArgumentError(f"rows of {columns} numbers: these kernels take 1 to {MAX_COLUMNS}; use PyTorch's own.")
    block = max(16, 1 << (columns - 1).bit_length())
    rows = max(1, _TILE // block)
    return Tile(rows, block, min(16, rows * block // 256))


def check_dtypes(purpose: str, *tensors: Tensor) -> None:
    """Refuse what float32 cannot hold.

    Raises:
        ArgumentError: a tensor's dtype is none of `DTYPES`.
    """
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise ArgumentError(f"{purpose} takes float32, bfloat16 and float16, not {tensor.dtype}.")
