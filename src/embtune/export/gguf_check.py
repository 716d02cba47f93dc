"""A written GGUF file read back: does it hold the model's numbers, within what their types can store?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from torch import Tensor

from embtune.errors import ExportError

# Rows compared at once: a vocabulary's matrix has several temporary copies.
_ROWS = 8192

# A block of Q8_0 is 32 integers up to 127 times one scale, the block's largest number / 127, in float16.
_BLOCK, _LARGEST_INTEGER = 32, 127

# Half the distance of float16's smallest numbers.
_TINY = 2.0**-25


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file: all but its value is known before the first is computed."""

    name: str
    """Its name in the file."""
    shape: tuple[int, ...]
    """Its shape in the file, rows first."""
    stored_as: GGMLQuantizationType
    """How its numbers are encoded."""
    rows: slice
    """The rows that are kept."""
    compute: Callable[[], Tensor]
    """Compute the merged value, in float32."""

    def values(self) -> np.ndarray:
        """The numbers to be encoded, float32 of `shape`."""
        return self.compute()[self.rows].cpu().numpy()


def check_gguf(path: Path, metadata: Mapping[str, Any], planned: Sequence[PlannedTensor]) -> None:
    """Compare a file with what it was written from, one tensor at a time.

    Args:
        path: the file.
        metadata: key -> value; each key must be there with this value.
        planned: all its tensors.

    Raises:
        ExportError: the file cannot be read, or a key or tensor differs; the message names it.
    """
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise ExportError(f"{path.name} cannot be read back: {error}. Is the disk full? Save again.") from error
    for key, value in metadata.items():
        field = reader.fields.get(key)
        if field is None or field.contents() != value:
            found = "nothing" if field is None else repr(field.contents())
            raise ExportError(f"{path.name}, read back, says {found} for {key}, not {value!r}; save again.")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    if odd := stored.keys() ^ {tensor.name for tensor in planned}:
        raise ExportError(
            f"{path.name}, read back, lacks or adds the tensors {', '.join(sorted(odd)[:3])}; save again."
        )
    for tensor in planned:
        found = stored[tensor.name]
        same_form = (found.tensor_type, tuple(found.shape.tolist()[::-1])) == (tensor.stored_as, tensor.shape)
        if not same_form or not _holds(found.data, tensor):
            raise ExportError(
                f"{path.name}, read back, does not hold {tensor.name} within the rounding of {tensor.stored_as.name}; "
                "save again."
            )


def _holds(data: np.ndarray, tensor: PlannedTensor) -> bool:
    values, encoded = np.atleast_2d(tensor.values()), np.atleast_2d(data)
    for start in range(0, len(values), _ROWS):
        wanted = values[start : start + _ROWS]
        found = dequantize(encoded[start : start + _ROWS], tensor.stored_as)
        # Written so that NaN, which compares with nothing, is refused too.
        if not (np.abs(found - wanted) <= _rounding(wanted, tensor.stored_as)).all():
            return False
    return True


def _rounding(values: np.ndarray, stored_as: GGMLQuantizationType) -> np.ndarray | float:
    """The largest difference that encoding may make to each number."""
    if stored_as == GGMLQuantizationType.F16:
        return np.abs(values) * 2.0**-11 + _TINY
    if stored_as == GGMLQuantizationType.BF16:
        return np.abs(values) * 2.0**-8
    if stored_as == GGMLQuantizationType.Q8_0:
        largest = np.abs(values.reshape(-1, _BLOCK)).max(axis=1)
        step = largest / _LARGEST_INTEGER + _LARGEST_INTEGER * _TINY
        return np.repeat(step, _BLOCK).reshape(values.shape)
    return 0.0
