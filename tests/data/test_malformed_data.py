"""Malformed input: one message with file, line, column and remedy, and nothing left behind."""

import gzip
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from embtune.data.readers import read_dataset
from embtune.errors import DataError

GOOD = b'{"anchor": "a", "positive": "b"}\n'
UTF8_MARK = b"\xef\xbb\xbf"


def parquet(columns: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


CASES: list[tuple[str, str, bytes, list[str]]] = [
    # what, ending, content, fragments of the message
    ("broken line", "jsonl", GOOD + b'{"anchor": "a", "positive": "b"\n', ["line 2", "broken JSON", "complete object"]),
    ("single quotes", "jsonl", b"{'anchor': 'a'}\n", ["line 1", "character 2", "double quotes"]),
    (
        "line break in a text",
        "jsonl",
        GOOD + b'{"anchor": "a\nb", "positive": "c"}\n',
        ["line 2", "character 12", "\\n"],
    ),
    ("two objects on a line", "jsonl", GOOD.strip() * 2, ["line 1", "character 33", "line of its own"]),
    ("list on a line", "jsonl", GOOD + b'["a", "b"]\n', ["line 2", "type list", "Name the columns"]),
    ("text on a line", "jsonl", b'"a"\n', ["line 1", "type str", "Name the columns"]),
    ("JSON list in JSON Lines", "jsonl", b"[" + GOOD + b"]", ["line 1", "rename it to end in .json"]),
    ("missing key", "jsonl", GOOD + b'{"anchor": "a"}\n', ["line 2", "'positive' is missing", "anchor, positive"]),
    (
        "extra key",
        "jsonl",
        GOOD + GOOD[:-2] + b', "id": 1}\n',
        ["line 2", "'id' is extra", "same columns", "--columns "],
    ),
    ("empty object", "jsonl", GOOD + b"{}\n", ["line 2", "'anchor' is missing"]),
    ("duplicate key", "jsonl", GOOD + b'{"anchor": "a", "anchor": "b"}\n', ["line 2", "'anchor' occurs twice", "Keep"]),
    ("number", "jsonl", GOOD + b'{"anchor": 3, "positive": "b"}\n', ["line 2", "'anchor'", "number 3", 'as "3"']),
    ("fraction", "jsonl", b'{"anchor": "a", "positive": 2.5}\n', ["line 1", "'positive'", "2.5", "quotes"]),
    ("boolean", "jsonl", b'{"anchor": true, "positive": "b"}\n', ["line 1", "'anchor'", "True", "quotes"]),
    (
        "null",
        "jsonl",
        GOOD + b'{"anchor": "a", "positive": null}\n',
        ["line 2", "'positive'", "null", "remove the row"],
    ),
    ("list as text", "jsonl", b'{"anchor": "a", "positive": ["b"]}\n', ["line 1", "'positive'", "list", "negative_1"]),
    ("object as text", "jsonl", b'{"anchor": "a", "positive": {"b": 1}}\n', ["line 1", "'positive'", "dict"]),
    (
        "empty text",
        "jsonl",
        GOOD + b'{"anchor": "", "positive": "b"}\n',
        ["line 2", "'anchor'", "empty text", "remove"],
    ),
    (
        "white space",
        "jsonl",
        b'{"anchor": "a", "positive": " \\n\\t\\u00a0"}\n',
        ["line 1", "'positive'", "empty text"],
    ),
    ("NUL", "jsonl", b'{"anchor": "a\\u0000", "positive": "b"}\n', ["line 1", "'anchor'", "NUL", "Remove"]),
    ("lone surrogate", "jsonl", b'{"anchor": "a", "positive": "\\ud83d"}\n', ["line 1", "'positive'", "\\ud83d"]),
    ("not UTF-8", "jsonl", GOOD + b'{"anchor": "\xe9", "positive": "b"}\n', ["line 2", "byte 13", "0xe9", "as UTF-8"]),
    ("UTF-16", "jsonl", GOOD.decode().encode("utf-16"), ["line 1", "UTF-16", "Save the file as UTF-8"]),
    ("spreadsheet called CSV", "csv", b"PK\x03\x04\x14\0\x06\0", ["is packed", "Save its sheet as CSV"]),
    ("old spreadsheet", "tsv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", ["old Office file", "Save its sheet as CSV"]),
    ("image", "jsonl", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ["is an image", "CSV or JSONL"]),
    ("Parquet called CSV", "csv", parquet({"text": ["a"]}), ["is a Parquet file", "Rename it"]),
    ("bytes", "csv", bytes(range(10)), ["holds no text", "zero bytes"]),
    ("compressed", "jsonl", gzip.compress(GOOD), ["is an archive (gzip)", "Unpack it"]),
    ("no rows", "jsonl", b"", ["no rows", "anchor"]),
    ("blank lines only", "jsonl", b"\n \n", ["no rows", "at least one"]),
    ("mark only", "jsonl", UTF8_MARK, ["no rows"]),
    (
        "unknown columns",
        "jsonl",
        b'{"prompt": "a", "code": "b"}\n',
        ["line 1", "'prompt', 'code'", "--columns prompt=anchor code=positive"],
    ),
    ("unknown column", "jsonl", b'{"id": "1", "query": "a", "answer": "b"}\n', ["line 1", "'id'", "query=anchor"]),
    ("one role twice", "jsonl", b'{"query": "a", "question": "b"}\n', ["line 1", "'query' and 'question'", "Remove"]),
    ("no positive", "jsonl", b'{"query": "a", "negative": "b"}\n', ["line 1", "'positive'", "map"]),
    ("label only", "jsonl", b'{"label": 1}\n', ["line 1", "no text column"]),
    ("text label", "jsonl", b'{"text": "a", "label": "x"}\n', ["line 1", "'label'", "'x'", "--columns text=text"]),
    ("boolean label", "jsonl", b'{"text": "a", "label": true}\n', ["line 1", "'label'", "Write 1 for true"]),
    ("null score", "jsonl", b'{"text": "a", "score": null}\n', ["line 1", "'score'", "empty", "remove the row"]),
    ("NaN label", "jsonl", b'{"text": "a", "label": NaN}\n', ["line 1", "'label'", "nan", "finite"]),
    ("huge label", "jsonl", b'{"text": "a", "label": 9223372036854775808}\n', ["line 1", "'label'", "finite"]),
    ("empty label list", "jsonl", b'{"text": "a", "label": []}\n', ["line 1", "'label'", "[]"]),
    (
        "labels of two lengths",
        "jsonl",
        b'{"text": "a", "label": [1, 2]}\n{"text": "b", "label": [1]}\n',
        ["line 2", "'label'", "list of 1 numbers", "list of 2 numbers"],
    ),
    ("mixed labels", "jsonl", b'{"text": "a", "label": 1}\n{"text": "b", "label": [1]}\n', ["line 2", "one number"]),
    ("deep nesting", "jsonl", GOOD + b'{"anchor": ' + b"[" * 100_000, ["line 2", "JSON", "Remove the row"]),
    ("endless digits", "jsonl", b'{"text": "a", "label": ' + b"9" * 5000 + b"}", ["line 1", "JSON", "Remove"]),
    ("object at the top", "json", b'{"data": []}', ["line 1", "list of objects", "save the list alone"]),
    ("JSON Lines in .json", "json", GOOD + GOOD, ["line 1", "rename it to end in .jsonl"]),
    ("empty file", "json", b"", ["line 1", "list of objects"]),
    ("empty list", "json", b"[]", ["no rows"]),
    ("missing comma", "json", b"[" + GOOD + GOOD + b"]", ["line 2", "comma"]),
    ("trailing comma", "json", b"[" + GOOD + b",\n]", ["line 3", "broken JSON"]),
    ("list not closed", "json", b"[\n" + GOOD, ["line 3", "closing ]"]),
    (
        "broken deep in a list",
        "json",
        b'[\n{"anchor": "a",\n "positive": }]',
        ["line 3", "character 14", "broken JSON"],
    ),
    ("text behind the list", "json", b"[" + GOOD + b"]\n[]", ["line 2", "follows the end", "one list"]),
    ("text in the list", "json", b'[\n"a"]', ["line 2", "type str", "Name the columns"]),
    ("null in the list", "json", b'[\n\n{"anchor": null, "positive": "b"}]', ["line 3", "'anchor'", "null"]),
    ("not UTF-8 in JSON", "json", b'[\n{"anchor": "\xff"}]', ["line 2", "0xff", "UTF-8"]),
    ("too many cells", "csv", b"anchor,positive\na,b\na,b,c\n", ["line 3", "3 cells", "2 columns", "double quotes"]),
    ("too few cells", "csv", b"anchor,positive\na\n", ["line 2", "1 cells", "anchor, positive"]),
    ("empty cell", "csv", b"anchor,positive\na,b\na,\n", ["line 3", "'positive'", "empty text"]),
    ("missing header", "csv", b"How do I sort?,Use sorted\n", ["line 1", "header is missing", "anchor,positive"]),
    ("duplicate header", "csv", b"anchor,positive,anchor\na,b,c\n", ["line 1", "'anchor' twice", "Rename"]),
    ("unnamed column", "csv", b",anchor,positive\n0,a,b\n", ["line 1", "column 1", "Name every column"]),
    ("unknown column in CSV", "csv", b"anchor,positive,id\na,b,1\n", ["line 1", "'id'", "--columns anchor=anchor"]),
    ("header only", "csv", b"anchor,positive\n", ["no rows"]),
    ("empty CSV", "csv", b"", ["no rows"]),
    ("quote not closed", "csv", b'anchor,positive\na,b\na,"b\nc,d\n', ["line 3", "quote is not closed", "JSONL"]),
    ("quote not doubled", "csv", b'anchor,positive\n"a"b,c\n', ["line 2", "not doubled"]),
    ("endless cell", "csv", b"anchor,positive\n" + b"a" * 200_000 + b",b\n", ["line 2", "field", "JSONL or Parquet"]),
    ("NUL in CSV", "csv", b"anchor,positive\na,b\0\n", ["line 2", "'positive'", "NUL"]),
    ("not UTF-8 in CSV", "csv", b"anchor,positive\ncaf\xe9,b\n", ["line 2", "byte 4", "0xe9", "UTF-8"]),
    ("text label in CSV", "csv", b"text,label\na,1\nb,yes\n", ["line 3", "'label'", "'yes'", "Number the classes"]),
    ("empty label in CSV", "csv", b"text,label\na,\n", ["line 2", "'label'", "empty"]),
    ("infinite label in CSV", "csv", b"text,label\na,inf\n", ["line 2", "'label'", "finite"]),
    ("grouped digits in CSV", "csv", b"text,label\na,1_000\n", ["line 2", "'label'", "'1_000'"]),
    ("ragged TSV", "tsv", b"anchor\tpositive\na b\n", ["line 2", "1 cells"]),
    ("not Parquet", "parquet", GOOD, ["no whole Parquet file", "JSONL or CSV"]),
    ("empty Parquet file", "parquet", b"", ["no whole Parquet file"]),
    ("cut Parquet", "parquet", parquet({"anchor": ["a"], "positive": ["b"]})[:-20], ["no whole Parquet file"]),
    ("Parquet without rows", "parquet", parquet({"anchor": pa.array([], pa.string())}), ["'positive'"]),
    (
        "Parquet with columns only",
        "parquet",
        parquet({"anchor": pa.array([], pa.string()), "positive": pa.array([], pa.string())}),
        ["no rows"],
    ),
    (
        "Parquet null",
        "parquet",
        parquet({"anchor": ["a", None], "positive": ["b", "c"]}),
        ["row 2", "'anchor'", "null"],
    ),
    ("Parquet nulls", "parquet", parquet({"anchor": ["a"], "positive": [None]}), ["row 1", "'positive'", "null"]),
    ("Parquet blank", "parquet", parquet({"anchor": ["a", "b", " "], "positive": ["c"] * 3}), ["row 3", "'anchor'"]),
    (
        "Parquet number",
        "parquet",
        parquet({"anchor": [None, 3], "positive": ["b"] * 2}),
        ["row 2", "number 3", "quotes"],
    ),
    ("Parquet list", "parquet", parquet({"anchor": ["a"], "positive": [["b"]]}), ["row 1", "'positive'", "list"]),
    ("Parquet bytes", "parquet", parquet({"anchor": [b"a"], "positive": ["b"]}), ["row 1", "'anchor'", "bytes"]),
    ("Parquet NUL", "parquet", parquet({"text": ["a", "b\0"]}), ["row 2", "'text'", "NUL"]),
    (
        "Parquet NaN",
        "parquet",
        parquet({"text": ["a", "b"], "label": [1.0, float("nan")]}),
        ["row 2", "'label'", "nan"],
    ),
    ("Parquet text label", "parquet", parquet({"text": ["a"], "label": ["x"]}), ["row 1", "'label'", "'x'"]),
    ("Parquet boolean label", "parquet", parquet({"text": ["a"], "label": [True]}), ["row 1", "'label'", "Write 1"]),
    ("Parquet ragged label", "parquet", parquet({"text": ["a", "b"], "label": [[1], [1, 2]]}), ["row 2", "list of 2"]),
    ("Parquet hole", "parquet", parquet({"text": ["a", "b"], "label": [[1], [None]]}), ["row 2", "'label'", "None"]),
    ("Parquet unknown column", "parquet", parquet({"a": ["x"], "b": ["y"]}), ["'a', 'b'", "--columns a=anchor"]),
]


@pytest.mark.parametrize(("ending", "content", "fragments"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_a_mistake_is_named_with_place_and_remedy(
    ending: str, content: bytes, fragments: list[str], tmp_path: Path
) -> None:
    path = tmp_path / f"pairs.{ending}"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_dataset(path)
    message = str(caught.value)
    assert str(path) in message
    for fragment in fragments:
        assert fragment in message, message
    assert len(message) < 1_000
    assert list(tmp_path.iterdir()) == [path]


def test_invalid_utf8_inside_parquet(tmp_path: Path) -> None:
    bad = pa.array([b"a", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet .*UTF8"):
        read_dataset(tmp_path / "rows.parquet")


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "training.jsonl").write_bytes(GOOD)
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"trainnig\.jsonl: there is no such file\. Did you mean training\.jsonl\?"):
        read_dataset(tmp_path / "trainnig.jsonl")
    with pytest.raises(DataError, match=r"Did you mean training\.jsonl\?.*owner/name"):
        read_dataset(str(tmp_path / "zzz"))
    with pytest.raises(DataError, match=r"no folder .*nowhere.*owner/name"):
        read_dataset(tmp_path / "nowhere" / "pairs.csv")
    with pytest.raises(DataError, match="no folder data"):
        read_dataset("data/pairs.jsonl")


def test_a_folder_names_its_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder\. Name a file that ends in \.jsonl"):
        read_dataset(tmp_path)
    (tmp_path / "b.csv").write_text("")
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(DataError, match=r"is a folder\. Name one of its files: a\.jsonl, b\.csv"):
        read_dataset(tmp_path)
    (tmp_path / "corpus.jsonl").write_text("")
    with pytest.raises(DataError, match=r"RetrievalData\.from_beir"):
        read_dataset(tmp_path)
    Dataset.from_dict({"anchor": ["a"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="load_from_disk"):
        read_dataset(tmp_path / "saved")


def test_what_is_no_data_file(tmp_path: Path) -> None:
    (tmp_path / "pairs.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"pairs\.xlsx is a spreadsheet\. Save its sheet as CSV"):
        read_dataset(tmp_path / "pairs.xlsx")
    (tmp_path / "pairs.doc").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"pairs\.doc: the ending '\.doc'.*\.jsonl, .*\.parquet"):
        read_dataset(tmp_path / "pairs.doc")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=r"pipe\.jsonl is no regular file"):
        read_dataset(tmp_path / "pipe.jsonl")


def test_permission_denied() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / "pairs.jsonl"
        path.write_bytes(GOOD)
        read_dataset(path)
        path.chmod(0)
        user = os.geteuid()
        if user == 0:  # the superuser may read everything, so step down to an ordinary user
            os.seteuid(65534)
        try:
            with pytest.raises(DataError, match=r"pairs\.jsonl: permission denied.*chmod"):
                read_dataset(path)
        finally:
            os.seteuid(user)


def test_datasets_without_rows_or_with_bad_cells() -> None:
    with pytest.raises(DataError, match="the dataset holds no rows"):
        read_dataset(Dataset.from_dict({"anchor": [], "positive": []}))
    with pytest.raises(DataError, match=r"row 2 \(dataset\[1\]\), column 'positive' is empty \(null\)"):
        read_dataset(Dataset.from_dict({"anchor": ["a", "b"], "positive": ["c", None]}))
    rows = {"prompt": ["a"] * 10_002, "code": ["b"] * 10_001 + [""]}
    with pytest.raises(DataError, match=r"dataset\[10001\]\), column 'code' is an empty text"):
        read_dataset(Dataset.from_dict(rows), columns={"prompt": "anchor", "code": "positive"})
