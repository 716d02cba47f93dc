"""Token ids of whole text columns on disk, so that a text is tokenised once and not in every epoch of every run.

One entry is one column of texts as one tokenizer cut it: an Arrow file, named after all that its content depends on.
"""

import math
import os
import tempfile
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from huggingface_hub.constants import HF_HOME

VARIABLE = "EMBTUNE_CACHE"
"""Environment variable that names the folder of all of embtune's caches."""

ROWS = 10_000
"""Texts in each record batch of an entry; the last one may have fewer."""

MAX_BYTES = 10 * 10**9
"""Size to which the cache is cut back when an entry is added; the entries unused for longest go first."""

MAX_AGE = 30 * 24 * 3600.0
"""Seconds after which an entry that no run used is removed when another is added."""

_SCHEMA = pa.schema([pa.field("input_ids", pa.list_(pa.int32()), nullable=False)])
_CHECKSUM = b"crc32"
_UNFINISHED_FOR = 24 * 3600.0  # seconds after which the file of a write that never ended is taken for abandoned


def record_batch(ids: Sequence[Sequence[int]]) -> pa.RecordBatch:
    """The token ids of up to `ROWS` texts, as entries hold them."""
    return pa.record_batch([pa.array(ids, _SCHEMA.field(0).type)], schema=_SCHEMA)


class TokenColumn:
    """The token ids of each text of a column. Those of an entry stay in its file until they are asked for.

    Args:
        batches: `ROWS` texts each; the last may have fewer.
        path: the entry they come from, or None if they are in memory.
    """

    def __init__(self, batches: Sequence[pa.RecordBatch], path: Path | None = None) -> None:
        self._batches = list(batches)
        self._path = path
        chunks = [_offsets_and_values(batch) for batch in self._batches]
        self._values = [values for _, values in chunks]
        self._begins, self._ends = (
            np.concatenate([offsets[part] for offsets, _ in chunks] or [np.zeros(0, np.int64)])
            for part in (slice(None, -1), slice(1, None))
        )

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self._batches)

    def __getitem__(self, row: int) -> np.ndarray:
        """The ids of one text, int32 and read-only."""
        return self.take([row])[0]

    def take(self, rows: Sequence[int]) -> list[np.ndarray]:
        """The ids of several texts, each int32 and read-only."""
        # Numbers of PyTorch's and NumPy's own cost more than the slices that they are for.
        begins, ends = self._begins[rows].tolist(), self._ends[rows].tolist()
        return [self._values[row // ROWS][begin:end] for row, begin, end in zip(rows, begins, ends, strict=True)]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text [rows]."""
        return self._ends - self._begins

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers that are started anew open the file, instead of being sent what is in it.
        return (_open, (self._path,)) if self._path else (TokenColumn, (self._batches,))


@dataclass(frozen=True)
class Entry:
    """One file of the cache."""

    path: Path
    bytes: int
    used: float
    """When a run last read or wrote it, in seconds since 1970."""
    facts: Mapping[str, str] | None
    """What was given when it was written, or None if the file is damaged."""


@dataclass(frozen=True)
class TokenCache:
    """The entries of one folder; several processes may use it at once, since an entry appears whole or not at all."""

    folder: Path

    @classmethod
    def default(cls) -> "TokenCache":
        """In the folder that `EMBTUNE_CACHE` names, else beside the caches of Hugging Face's libraries."""
        return cls(Path(os.environ.get(VARIABLE) or Path(HF_HOME) / "embtune").expanduser() / "tokens")

    def read(self, key: str, rows: int) -> TokenColumn | None:
        """The entry of that name; None if there is none, or if it is damaged or of another length: then it is removed.

        Raises:
            OSError: the folder cannot be used.
        """
        path = self._path(key)
        if not path.exists():
            return None
        column = None
        with suppress(pa.ArrowException, OSError):
            column = _open(path)
        if column is None or len(column) != rows:
            path.unlink(missing_ok=True)
            return None
        with suppress(OSError):  # removed by another process a moment ago, or not ours to touch; it is open already
            os.utime(path)
        return column

    def write(self, key: str, batches: Iterable[pa.RecordBatch], facts: Mapping[str, str]) -> None:
        """Write an entry batch by batch; nothing is left of it if `batches` or the disk fails.

        Args:
            batches: as `TokenColumn` takes them.
            facts: what `entries` shows of it.

        Raises:
            OSError: the folder cannot be written to, or is full.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=self.folder)
        os.close(descriptor)
        try:
            with pa.OSFile(name, "wb") as sink, pa.ipc.new_file(sink, _SCHEMA.with_metadata(dict(facts))) as writer:
                for batch in batches:
                    writer.write_batch(batch, custom_metadata={_CHECKSUM: _checksum(batch)})
            os.replace(name, self._path(key))
        finally:
            Path(name).unlink(missing_ok=True)

    def entries(self) -> list[Entry]:
        """All entries, those unused for longest first."""
        found = []
        for path in self.folder.glob("*.arrow"):
            with suppress(FileNotFoundError):  # removed by another process since it was listed
                status = path.stat()
                found.append(Entry(path, status.st_size, status.st_mtime, _facts(path)))
        return sorted(found, key=lambda entry: entry.used)

    def prune(self, max_bytes: float = MAX_BYTES, max_age: float = MAX_AGE) -> list[Entry]:
        """Remove entries unused for more than `max_age` seconds, then the oldest until `max_bytes` are kept.

        Runs that have an entry open go on reading it. Returns what was removed.

        Raises:
            OSError: an entry cannot be removed.
        """
        entries = self.entries()
        now, size = time.time(), sum(entry.bytes for entry in entries)
        removed = []
        for entry in entries:
            if now - entry.used > max_age or size > max_bytes:
                entry.path.unlink(missing_ok=True)
                size -= entry.bytes
                removed.append(entry)
        for path in self.folder.glob(".*.tmp"):
            with suppress(FileNotFoundError):
                if now - path.stat().st_mtime > min(_UNFINISHED_FOR, max_age):
                    path.unlink()
        return removed

    def clear(self) -> list[Entry]:
        """Remove every entry, and what unfinished writes have left; returns the entries."""
        return self.prune(max_age=-math.inf)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.arrow"


def _open(path: Path) -> TokenColumn:
    """Open an entry and check all of it; raises `ArrowException` or `OSError` if it is not as it was written."""
    with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
        if not reader.schema.equals(_SCHEMA):
            raise pa.ArrowInvalid(f"{path} has the columns of another version.")
        batches = []
        for index in range(reader.num_record_batches):
            batch, metadata = reader.get_batch_with_custom_metadata(index)
            batch.validate()
            whole = batch.num_rows == ROWS or index == reader.num_record_batches - 1
            if not whole or metadata is None or metadata.get(_CHECKSUM) != _checksum(batch):
                raise pa.ArrowInvalid(f"{path} is damaged in record batch {index}.")
            batches.append(batch)
    return TokenColumn(batches, path)


def _facts(path: Path) -> dict[str, str] | None:
    try:
        with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
            return {name.decode(): value.decode() for name, value in (reader.schema.metadata or {}).items()}
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return None


def _offsets_and_values(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    ids = batch.column(0)
    return ids.offsets.to_numpy(), ids.values.to_numpy()


def _checksum(batch: pa.RecordBatch) -> bytes:
    offsets, values = _offsets_and_values(batch)
    return b"%08x" % zlib.crc32(values.data, zlib.crc32(offsets.data))
