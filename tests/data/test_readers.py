"""Reading what is in order: every format gives the same rows back."""

import csv
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from embtune.data.readers import read_dataset, read_raw
from embtune.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from hub_server import HubServer

pytest_plugins = ["hub_server"]

ALPHABET = ["a", "ß", "日", "🙂", '"', "'", ",", ";", "\t", "\n", "\r\n", "\\", "\u2028", "\x85", "\x0b", " ", "{", "]"]
Rows = list[dict[str, Any]]


def random_rows(count: int, seed: int) -> Rows:
    generator = random.Random(seed)

    def text() -> str:
        return "x" + "".join(generator.choices(ALPHABET, k=generator.randint(0, 30)))

    return [
        {
            "score": generator.choice([0.0, 0.25, 1.0]),
            "answer": text(),
            "neg_2": text(),
            "neg_1": text(),
            "Query": text(),
        }
        for _ in range(count)
    ]


def write(path: Path, rows: Rows) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    elif path.suffix in (".jsonl", ".ndjson"):
        path.write_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            dialect = "excel" if path.suffix == ".csv" else "excel-tab"
            writer = csv.DictWriter(file, list(rows[0]), dialect=dialect)
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".JSONL"])
def test_round_trip(ending: str, tmp_path: Path) -> None:
    for seed in range(5):
        rows = random_rows(40, seed)
        path = write(tmp_path / f"pairs{seed}{ending.lower()}", rows)
        if ending.isupper():
            path = path.rename(path.with_suffix(ending))
        dataset = read_dataset(path)
        assert dataset.column_names == ["anchor", "positive", "negative_1", "negative_2", "score"]
        assert dataset.features["score"] == Value("float64")
        renamed = [[row[name] for name in ("Query", "answer", "neg_1", "neg_2", "score")] for row in rows]
        assert [list(row.values()) for row in dataset] == renamed


def test_pandas_style_csv_round_trip(tmp_path: Path) -> None:
    dataset = Dataset.from_list([{"anchor": "a, b", "positive": 'he said "c"\nand left', "label": 3}])
    dataset.to_csv(tmp_path / "pairs.csv")
    assert read_dataset(str(tmp_path / "pairs.csv"))[:] == dataset[:]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv"])
def test_a_utf8_mark_and_windows_line_ends_are_accepted(ending: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"pairs{ending}", [{"anchor": "é", "positive": "ü"}, {"anchor": "c", "positive": "d"}])
    text = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text)
    assert read_dataset(path)[:] == {"anchor": ["é", "c"], "positive": ["ü", "d"]}


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_limit_stops_reading(ending: str, tmp_path: Path) -> None:
    rows = [{"anchor": f"a{row}", "positive": f"b{row}"} for row in range(5)] + [{"anchor": " ", "positive": "b"}]
    path = write(tmp_path / f"pairs{ending}", rows)
    assert read_dataset(path, limit=5)["anchor"] == [f"a{row}" for row in range(5)]
    with pytest.raises(DataError, match="empty text"):
        read_dataset(path, limit=6)


def test_blank_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('\n{"anchor": "a", "positive": "b"}\n  \n{"anchor": "c"}\n')
    assert len(read_dataset(path, limit=1)) == 1
    with pytest.raises(DataError, match=r"pairs\.jsonl, line 4: column 'positive' is missing"):
        read_dataset(path)
    path = tmp_path / "pairs.csv"
    path.write_text('\nanchor,positive\n\n"a\nb",c\nd,\n')
    with pytest.raises(DataError, match=r"pairs\.csv, line 6, column 'positive' is an empty text"):
        read_dataset(path)


def test_a_mapping_leaves_columns_out(tmp_path: Path) -> None:
    rows = [{"id": 7, "prompt": "p", "code": "c", "notes": None}, {"prompt": "q", "code": "d"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    dataset = read_dataset(path, columns={"code": "positive", "prompt": "anchor"})
    assert dataset[:] == {"anchor": ["p", "q"], "positive": ["c", "d"]}


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_labels_keep_their_form(ending: str, tmp_path: Path) -> None:
    for labels, kind in ([3, -1], "int64"), ([1, 0.5], "float64"), ([[1.5, 2.0], [0.0, 3.0]], "float64"):
        rows = [{"text": f"t{row}", "label": label} for row, label in enumerate(labels)]
        dataset = read_dataset(write(tmp_path / f"rows{ending}", rows))
        assert dataset["label"] == labels
        feature = dataset.features["label"]
        assert (feature.feature if isinstance(labels[0], list) else feature) == Value(kind)


def test_csv_labels_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("label,text\n1,a\n 0,b\n")
    assert read_dataset(path)["label"] == [1, 0]
    path.write_text("label,text\n1,a\n2.5e-1,b\n")
    assert read_dataset(path)["label"] == [1.0, 0.25]


def test_long_files_keep_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    with path.open("w") as file:
        for row in range(25_001):
            file.write(f'{{"anchor": "a{row}", "positive": "b{row}"}}\n\n')
    dataset = read_dataset(path)
    assert dataset["anchor"][:] == [f"a{row}" for row in range(25_001)]
    assert dataset["positive"][-1] == "b25000"
    with path.open("a") as file:
        file.write('{"anchor": "a", "positive": 3}\n')
    with pytest.raises(DataError, match=r"line 50003, column 'positive' is the number 3"):
        read_dataset(path)


def test_the_fingerprint_depends_on_the_content_alone(tmp_path: Path) -> None:
    rows = random_rows(30, seed=1)
    one = read_dataset(write(tmp_path / "one.jsonl", rows))
    same = read_dataset(write(tmp_path / "same.jsonl", rows))
    other = read_dataset(write(tmp_path / "other.jsonl", rows[:-1] + random_rows(1, seed=2)))
    assert one._fingerprint == same._fingerprint != other._fingerprint


def test_parquet_of_pandas_categories(tmp_path: Path) -> None:
    table = pa.table({"query": pa.array(["a", "b", "a"]).dictionary_encode(), "answer": ["x", "y", "z"]})
    pq.write_table(table, tmp_path / "pairs.parquet")
    assert read_dataset(tmp_path / "pairs.parquet")["anchor"] == ["a", "b", "a"]


def test_datasets_are_checked_and_made_canonical() -> None:
    features = Features({"label": ClassLabel(names=["no", "yes"]), "text": Value("large_string")})
    dataset = Dataset.from_dict({"label": [1, 0, 1], "text": ["a", "b", "c"]}, features=features)
    result = read_dataset(dataset, limit=2)
    assert result.column_names == ["text", "label"]
    assert result[:] == {"text": ["a", "b"], "label": [1, 0]}
    plain = Dataset.from_dict({"anchor": ["a"], "positive": ["b"]})
    assert read_dataset(plain) is plain
    splits = DatasetDict({"train": plain, "test": Dataset.from_dict({"query": ["q"], "answer": ["r"]})})
    assert read_dataset(splits) is plain
    assert read_dataset(splits, split="test")["anchor"] == ["q"]


def test_formatted_and_shuffled_datasets_are_checked_by_value() -> None:
    dataset = Dataset.from_dict({"text": ["a", "b", " "], "label": [[0.5, 1.0], [1.0, 2.0], [3.0, 4.0]]})
    assert len(read_dataset(dataset.select([1, 0]).with_format("torch"))) == 2
    with pytest.raises(DataError, match=r"row 1 \(dataset\[0\]\), column 'text' is an empty text"):
        read_dataset(dataset.select([2, 0]).with_format("torch"))


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [{"anchor": "a", "positive": "b"}])
    dataset = read_dataset(path)
    for source in path, dataset:
        with pytest.raises(ArgumentError, match=r"split='test'.*no splits"):
            read_dataset(source, split="test")
    with pytest.raises(ArgumentError, match=r"split='dev'.*'train'"):
        read_dataset(DatasetDict(train=dataset), split="dev")
    with pytest.raises(ArgumentError, match="limit=0"):
        read_dataset(path, limit=0)
    with pytest.raises(ArgumentError, match=r"type list cannot be read.*Dataset\.from_list"):
        read_dataset([{"anchor": "a"}])  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="IterableDataset goes to the trainer"):
        read_dataset(dataset.to_iterable_dataset())


HUB_PROGRAM = """
import sys
from embtune.data.readers import read_dataset, read_raw
from embtune.errors import DataError
for source, options in [
    ("ada/secret", {}),
    ("ada/nowhere", {}),
    ("ada/pairs", {"split": "dev"}),
    ("ada/configured", {}),
    ("ada/pairs", {}),
    ("ada/pairs", {"split": "test"}),
    ("ada/pairs", {"split": "train[:1]"}),
    ("ada/configured:second", {}),
    ("ada/secret", {"token": "hf_read"}),
]:
    try:
        print(read_dataset(source, **options)[:])
    except DataError as error:
        print("DataError", " ".join(str(error).split()))
raw = read_raw("ada/configured:second")
print(raw.source, raw.unit, list(raw.rows))
"""


def test_hub_datasets(hub: "HubServer", tmp_path: Path) -> None:
    def folder(name: str, files: dict[str, str]) -> Path:
        for file, content in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path / name

    train = '{"answer": "b", "query": "a"}\n{"answer": "d", "query": "c"}\n'
    test = '{"answer": "f", "query": "e"}\n'
    hub.add("ada/pairs", folder("pairs", {"train.jsonl": train, "test.jsonl": test}), repo_type="dataset")
    hub.add("ada/secret", folder("secret", {"train.jsonl": test}), repo_type="dataset", private=True)
    first_config, second_config = (f"- config_name: {name}\n  data_files: {name}/*\n" for name in ("first", "second"))
    card = f"---\nconfigs:\n{first_config}{second_config}---\n"
    configured = {"README.md": card, "first/train.jsonl": train, "second/train.jsonl": test}
    hub.add("ada/configured", folder("configured", configured), repo_type="dataset")
    run = subprocess.run(
        [sys.executable, "-c", HUB_PROGRAM], env=hub.environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    expected = [
        ["ada/secret", "token"],
        ["ada/nowhere", "owner and name"],
        ["ada/pairs", "'dev'", "split="],
        ["ada/configured", "first", "second", "owner/name:configuration"],
    ]
    for line, fragments in zip(lines, expected, strict=False):
        assert line.startswith("DataError")
        assert all(fragment in line for fragment in fragments), line
    two, one = {"anchor": ["a", "c"], "positive": ["b", "d"]}, {"anchor": ["e"], "positive": ["f"]}
    assert lines.pop() == "ada/configured:second row [(1, {'answer': 'f', 'query': 'e'})]"
    assert lines[4:] == [str(rows) for rows in (two, one, {"anchor": ["a"], "positive": ["b"]}, one, one)]


def test_an_unreachable_hub_is_said_so() -> None:
    with pytest.raises(DataError, match=r"ada/pairs cannot be reached.*HF_HUB_OFFLINE"):
        read_dataset("ada/pairs")


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("x.csv", "anchor;positive\na, b, c;d\ne;f\n", "semicolons"),
        ("x.csv", "anchor\tpositive\na;b\tc\n", "tabs"),
        ("x.tsv", "anchor,positive\na,b\n", "commas"),
        ("x.csv", 'anchor,positive\n"a; b, c",d;e\n', "commas"),
        ("x.csv", "anchor,positive;negative\na,b;c\n", "commas"),
        ("x.csv", "frage;antwort, lang;nr\nWas?;Das.;1\nWer, wie?;Der;2\n", "semicolons"),
        ("x.csv", "text\na; b\nc, d\n", "commas"),
    ],
)
def test_the_separator_is_recognised(tmp_path: Path, name: str, text: str, word: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    raw = read_raw(tmp_path / name)
    assert raw.separator == word
    if text.startswith("anchor") and ";negative" not in text:
        assert read_dataset(tmp_path / name).column_names == ["anchor", "positive"]
        assert len(list(raw.rows)) == text.count("\n") - 1
