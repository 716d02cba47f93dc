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
_TILE = 512


@dataclass(frozen=True)
class Tile:
    """What one program holds at once: some whole rows, in registers."""

    rows: int
    """Rows side by side."""
    block: int
    """Places for the columns of a row: the next power of two."""
    warps: int
    """Warps that share the work: one up to 1,024 numbers, since warps that share a row wait for each other's sums."""

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
    # The fastest of nine on an H200 for 384 and 768 columns (docs/decisions.md).
    return Tile(rows, block, min(16, max(1, rows * block // 1024)))


class ColumnSums:
    """Sums over the rows of a matrix, of which programs add up parts: the gradients of a norm's weight and bias.

    Args:
        like: a tensor [T, D] on the device.
        programs: P, how many parts there are.
        wanted: whether each of the sums is.
    """

    def __init__(self, like: Tensor, programs: int, *wanted: bool) -> None:
        self._wanted = wanted
        # All in one tensor, which one kernel adds up.
        self._all = like.new_empty(sum(wanted), programs, like.shape[1], dtype=torch.float32)

    @property
    def parts(self) -> list[Tensor | None]:
        """The parts [P, D] of each sum, to be filled; None for one that nobody wants."""
        return self._where_wanted(self._all)

    def totals(self, *dtypes: torch.dtype | None) -> list[Tensor | None]:
        """The sums [D], each in its dtype."""
        totals = self._where_wanted(self._all.sum(1)) if any(self._wanted) else [None] * len(dtypes)
        return [None if each is None else each.to(dtype) for each, dtype in zip(totals, dtypes, strict=True)]

    def _where_wanted(self, values: Tensor) -> list[Tensor | None]:
        found = iter(values)
        return [next(found) if wanted else None for wanted in self._wanted]


def check_dtypes(purpose: str, *tensors: Tensor) -> None:
    """Refuse what float32 cannot hold.

    Raises:
        ArgumentError: a tensor's dtype is none of `DTYPES`.
    """
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise ArgumentError(f"{purpose} takes float32, bfloat16 and float16, not {tensor.dtype}.")
