"""The token cache on disk: what comes back is what went in, or nothing."""

import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from embtune.data.token_cache import ROWS, TokenCache, TokenColumn, record_batch

COUNT = ROWS + 37
IDS = [list(range(index % 7)) for index in range(COUNT)]


def batches() -> Iterator[pa.RecordBatch]:
    for start in range(0, COUNT, ROWS):
        yield record_batch(IDS[start : start + ROWS])


@pytest.fixture
def cache(tmp_path: Path) -> TokenCache:
    """A cache with one entry, `key`."""
    cache = TokenCache(tmp_path / "tokens")
    cache.write("key", batches(), {"tokenizer": "a tokenizer"})
    return cache


def assert_whole(column: TokenColumn | None) -> None:
    assert column is not None and len(column) == COUNT
    for row in (0, 1, 6, ROWS - 1, ROWS, COUNT - 1):
        assert column[row].tolist() == IDS[row]
        assert column[row].dtype == np.int32


def test_an_entry_holds_what_was_written(cache: TokenCache) -> None:
    column = cache.read("key", COUNT)
    assert_whole(column)
    assert_whole(pickle.loads(pickle.dumps(column)))
    assert len(pickle.dumps(column)) < 1_000, "a worker that is started anew opens the file"
    assert_whole(pickle.loads(pickle.dumps(TokenColumn(list(batches())))))
    assert cache.read("another key", COUNT) is None


def _flip(data: bytearray) -> None:
    data[len(data) // 2] ^= 1


def _cut(data: bytearray) -> None:
    del data[-100:]


def _half(data: bytearray) -> None:
    del data[len(data) // 2 :]


def _empty(data: bytearray) -> None:
    data.clear()


def _text(data: bytearray) -> None:
    data[:] = b"not an Arrow file"


@pytest.mark.parametrize("damage", [_flip, _cut, _half, _empty, _text])
def test_a_damaged_entry_is_never_trusted(damage: object, cache: TokenCache) -> None:
    [entry] = cache.entries()
    data = bytearray(entry.path.read_bytes())
    damage(data)
    entry.path.write_bytes(data)
    assert len(cache.entries()) == 1
    assert cache.read("key", COUNT) is None
    assert cache.entries() == []
    cache.write("key", batches(), {})
    assert_whole(cache.read("key", COUNT))


def test_an_entry_of_other_rows_or_columns_is_never_trusted(cache: TokenCache) -> None:
    assert cache.read("key", COUNT + 1) is None
    assert cache.entries() == []
    other = pa.record_batch([pa.array([1])], names=["input_ids"])
    with pa.OSFile(str(cache.folder / "key.arrow"), "wb") as sink, pa.ipc.new_file(sink, other.schema) as writer:
        writer.write_batch(other)
    assert cache.read("key", 1) is None


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path / "tokens")

    def failing() -> Iterator[pa.RecordBatch]:
        yield next(batches())
        raise RuntimeError("the tokenizer failed")

    with pytest.raises(RuntimeError, match="the tokenizer failed"):
        cache.write("key", failing(), {})
    assert list(cache.folder.iterdir()) == []


def test_two_processes_may_write_the_same_entry_while_a_third_reads_it(cache: TokenCache) -> None:
    opened = cache.read("key", COUNT)

    def interrupted() -> Iterator[pa.RecordBatch]:
        first, second = batches()
        yield first
        cache.write("key", batches(), {"tokenizer": "the second"})
        yield second

    cache.write("key", interrupted(), {"tokenizer": "the first"})
    [entry] = cache.entries()
    assert entry.facts == {"tokenizer": "the first"}
    assert_whole(cache.read("key", COUNT))
    cache.clear()
    assert_whole(opened)


def test_the_cache_is_bounded_in_size_and_age(cache: TokenCache) -> None:
    now = time.time()
    cache.write("unused", batches(), {})
    cache.write("newest", batches(), {})
    for key, age in (("unused", 5_000), ("key", 4_000), ("newest", 100)):
        os.utime(cache.folder / f"{key}.arrow", (now - age, now - age))
    cache.read("unused", COUNT)  # which is used again by that
    assert [entry.path.stem for entry in cache.entries()] == ["key", "newest", "unused"]
    size = cache.entries()[0].bytes
    assert cache.prune(max_bytes=3 * size, max_age=10_000) == []
    assert [entry.path.stem for entry in cache.prune(max_age=3_000)] == ["key"]
    assert [entry.path.stem for entry in cache.prune(max_bytes=1.5 * size)] == ["newest"]
    (cache.folder / ".abandoned.tmp").touch()
    cache.prune()
    assert (cache.folder / ".abandoned.tmp").exists(), "somebody may be writing it"
    os.utime(cache.folder / ".abandoned.tmp", (0, 0))
    cache.prune()
    assert [path.name for path in cache.folder.iterdir()] == ["unused.arrow"]
    assert len(cache.clear()) == 1
    assert list(cache.folder.iterdir()) == []


def test_the_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBTUNE_CACHE", str(tmp_path))
    assert TokenCache.default().folder == tmp_path / "tokens"
    assert TokenCache.default().entries() == []
    monkeypatch.delenv("EMBTUNE_CACHE")
    assert TokenCache.default().folder.parts[-2:] == ("embtune", "tokens")
