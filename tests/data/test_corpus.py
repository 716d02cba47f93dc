"""Rows as a file holds them, and the texts of a corpus."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embtune.data.corpus import read_corpus
from embtune.data.readers import read_raw
from embtune.errors import ArgumentError, DataError

ROWS: list[dict[str, Any]] = [{"frage": "a, b?", "n": 1}, {"frage": "", "n": 2}]


def written(folder: Path, ending: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"rows{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ending == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif ending in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if ending == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("ending", "unit", "numbers"),
    [
        (".jsonl", "line", [1, 3]),
        (".ndjson", "line", [1, 3]),
        (".json", "line", [2, 6]),
        (".csv", "line", [2, 3]),
        (".tsv", "line", [2, 3]),
        (".parquet", "row", [1, 2]),
    ],
)
def test_raw_rows_of_every_format(tmp_path: Path, ending: str, unit: str, numbers: list[int]) -> None:
    raw = read_raw(written(tmp_path, ending, ROWS))
    rows = list(raw.rows)
    assert raw.unit == unit
    assert [number for number, _ in rows] == numbers
    texts = raw.parse_label is not None
    assert texts == (ending in (".csv", ".tsv"))
    assert [row for _, row in rows] == [{"frage": r["frage"], "n": str(r["n"]) if texts else r["n"]} for r in ROWS]


def test_raw_rows_that_cannot_be_read(tmp_path: Path) -> None:
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match="broken.parquet is no whole Parquet file"):
        list(read_raw(broken).rows)
    ragged = tmp_path / "ragged.csv"
    ragged.write_text("a,b\n1\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"ragged.csv, line 2: 1 cells"):
        list(read_raw(ragged).rows)
    with pytest.raises(DataError, match="there is no such file. Did you mean broken.parquet"):
        read_raw(tmp_path / "brokn.parquet")
    with pytest.raises(ArgumentError, match="split='test': a file has no splits"):
        read_raw(ragged, split="test")


def test_a_corpus_of_each_form(tmp_path: Path) -> None:
    only = [{"anything": "one"}, {"anything": " "}, {"anything": "two"}]
    named = [{"id": "1", "passage": "one"}, {"id": "2", "passage": "two"}]
    titled = [{"_id": "1", "title": "A", "text": "one"}, {"_id": "2", "title": "", "text": "two"}]
    (tmp_path / "beir").mkdir()
    written(tmp_path, ".jsonl", titled).rename(tmp_path / "beir" / "corpus.jsonl")
    assert read_corpus(written(tmp_path, ".csv", only)) == ["one", "two"]
    assert read_corpus(written(tmp_path, ".parquet", named)) == ["one", "two"]
    assert read_corpus(tmp_path / "beir") == ["A one", "two"]
    assert read_corpus(tmp_path / "beir", column="text") == ["one", "two"]
    assert read_corpus(written(tmp_path, ".jsonl", named), column="id") == ["1", "2"]


def test_a_corpus_that_is_not_clear(tmp_path: Path) -> None:
    path = written(tmp_path, ".jsonl", [{"one": "a", "two": "b"}])
    with pytest.raises(DataError, match="which column holds the texts is not clear; columns: 'one', 'two'"):
        read_corpus(path)
    with pytest.raises(ArgumentError, match="has no column 'three'; columns: 'one', 'two'"):
        read_corpus(path, column="three")
    with pytest.raises(DataError, match="line 3, column 'text' is the number 7"):
        read_corpus(written(tmp_path, ".jsonl", [{"text": "a"}, {"text": 7}]))
    with pytest.raises(DataError, match="holds no texts"):
        read_corpus(written(tmp_path, ".jsonl", [{"text": " "}]))
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="empty.jsonl holds no texts"):
        read_corpus(tmp_path / "empty.jsonl")
