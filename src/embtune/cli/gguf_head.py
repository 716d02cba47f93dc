"""The head of a GGUF file: its settings and what its tensors are, with the lists of a vocabulary skipped.

`gguf.GGUFReader` makes an object of each token, which takes seconds for a multilingual vocabulary. The layout is
described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

# Type of a value -> its form for `struct`; 8 is a text, 9 a list.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9


@dataclass
class GgufHead:
    """What the head says."""

    values: dict[str, Any] = field(default_factory=dict)
    """Key -> number, text or truth value; lists are left out."""
    numbers: dict[int, int] = field(default_factory=dict)
    """ggml's number of a type -> how many numbers are stored so."""


def read_gguf_head(path: Path) -> GgufHead:
    """Read the head of a file.

    Raises:
        ValueError: it is no GGUF file of version 2 or 3, or ends too early.
        OSError: it cannot be read.
    """
    head = GgufHead()
    with path.open("rb") as file:
        reader = _Reader(file, path.stat().st_size)
        if reader.take(4) != b"GGUF":
            raise ValueError("it does not begin as GGUF does")
        version, tensors, values = reader.unpack("I"), reader.unpack("Q"), reader.unpack("Q")
        if version not in (2, 3):
            raise ValueError(f"its version {version} is not 2 or 3")
        for _ in range(values):
            key = reader.text()
            value = reader.value(reader.unpack("I"))
            if value is not None:
                head.values[key] = value
        for _ in range(tensors):
            reader.text()
            shape = [reader.unpack("Q") for _ in range(reader.unpack("I"))]
            kind = reader.unpack("I")
            reader.unpack("Q")
            head.numbers[kind] = head.numbers.get(kind, 0) + prod(shape)
    return head


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def take(self, count: int) -> bytes:
        # A damaged length may be larger than memory.
        data = self.file.read(count) if count <= self.size else b""
        if len(data) < count:
            raise ValueError("it ends too early")
        return data

    def unpack(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.take(self.unpack("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        """A value of that kind; None for a list, which is passed over."""
        if kind == _TEXT:
            return self.text()
        if kind == _LIST:
            self._skip_list()
            return None
        if kind not in _SCALARS:
            raise ValueError(f"it holds a value of the unknown type {kind}")
        return self.unpack(_SCALARS[kind])

    def _skip_list(self) -> None:
        kind, count = self.unpack("I"), self.unpack("Q")
        if kind in _SCALARS:
            self.take(count * struct.calcsize(_SCALARS[kind]))
        elif kind == _TEXT:
            for _ in range(count):
                self.take(self.unpack("Q"))
        else:
            for _ in range(count):
                self.value(kind)
