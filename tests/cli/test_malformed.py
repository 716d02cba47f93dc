"""Malformed input through the whole command line: one message with place and remedy, no traceback, no file left."""

import io
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import embtune.cli.train  # noqa: F401 (a user who has stepped down may not read the packages it imports)
from embtune.cli.main import main

PAIR = b'{"anchor": "how to sort rows", "positive": "sort the rows"}\n'
OTHER = b'{"anchor": "how to read words", "positive": "read the words"}\n'
SCORED = b"sentence1,sentence2,score\n"
LABELLED = b"text,label\n"
TRAIN = "train --model MODEL --batch-size 2 --max-steps 1 --data "


def parquet(columns: dict[str, list[str | None]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def beir(**parts: bytes) -> dict[str, bytes]:
    """The files of a small BEIR folder, with some of them replaced."""
    whole = {
        "queries": b'{"_id": "q0", "text": "how to sort"}\n{"_id": "q1", "text": "how to read"}\n',
        "corpus": b'{"_id": "d0", "text": "sort it"}\n{"_id": "d1", "text": "read it"}\n',
        "qrels": b"query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t1\n",
        **parts,
    }
    names = {"queries": "b/queries.jsonl", "corpus": "b/corpus.jsonl", "qrels": "b/qrels/test.tsv"}
    return {names[part]: content for part, content in whole.items() if content}


Case = tuple[dict[str, bytes], str, list[str]]
# What is wrong -> (files beside those of `work_dir`, command line, what the message must say). MODEL is a good one.
CASES: dict[str, Case] = {
    # rows to train on
    "broken line": ({"x.jsonl": PAIR + b'{"anchor": "a",\n'}, TRAIN + "x.jsonl", ["x.jsonl, line 2", "broken JSON"]),
    "number for a text": (
        {"x.jsonl": PAIR + b'{"anchor": 3, "positive": "b"}\n'},
        TRAIN + "x.jsonl",
        ["x.jsonl, line 2, column 'anchor'", "number 3", 'as "3"'],
    ),
    "empty text": (
        {"x.jsonl": PAIR + b'{"anchor": "a", "positive": " "}\n'},
        TRAIN + "x.jsonl",
        ["x.jsonl, line 2, column 'positive'", "empty text", "remove the row"],
    ),
    "null": (
        {"x.json": b'[{"anchor": "a", "positive": null}]'},
        TRAIN + "x.json",
        ["x.json, line 1, column 'positive'", "null"],
    ),
    "unknown column": (
        {"x.jsonl": b'{"anchor": "a", "positive": "b", "id": "7"}\n'},
        TRAIN + "x.jsonl",
        ["x.jsonl, line 1", "'id'", "--columns "],
    ),
    "one role twice": (
        {"x.jsonl": b'{"query": "a", "question": "b", "answer": "c"}\n'},
        TRAIN + "x.jsonl",
        ["x.jsonl, line 1", "'query' and 'question' both claim the role 'anchor'"],
    ),
    "no positive": ({"x.csv": b"anchor\na\n"}, TRAIN + "x.csv", ["x.csv, line 1", "no column has the role 'positive'"]),
    "not UTF-8": ({"x.csv": b"anchor,positive\ncaf\xe9,b\n"}, TRAIN + "x.csv", ["x.csv, line 2", "0xe9", "UTF-8"]),
    "UTF-16": ({"x.jsonl": PAIR.decode().encode("utf-16")}, TRAIN + "x.jsonl", ["x.jsonl, line 1", "UTF-16"]),
    "zero rows": ({"x.jsonl": b""}, TRAIN + "x.jsonl", ["x.jsonl holds no rows"]),
    "header alone": ({"x.csv": b"anchor,positive\n"}, TRAIN + "x.csv", ["x.csv holds no rows"]),
    "ragged rows": (
        {"x.csv": b"anchor,positive\na,b\nc,d,e\n"},
        TRAIN + "x.csv",
        ["x.csv, line 3", "3 cells", "double quotes"],
    ),
    "open quote": ({"x.tsv": b'anchor\tpositive\na\t"b\n'}, TRAIN + "x.tsv", ["x.tsv, line 2", "quote is not closed"]),
    "cut Parquet": (
        {"x.parquet": parquet({"anchor": ["a"], "positive": ["b"]})[:-9]},
        TRAIN + "x.parquet",
        ["x.parquet is no whole Parquet file", "Write it again"],
    ),
    "null in Parquet": (
        {"x.parquet": parquet({"anchor": ["a", None], "positive": ["b", "c"]})},
        TRAIN + "x.parquet",
        ["x.parquet, row 2, column 'anchor'", "null"],
    ),
    "a spreadsheet": ({"x.xlsx": b"PK"}, TRAIN + "x.xlsx", ["x.xlsx is a spreadsheet", "Save its sheet as CSV"]),
    "an image": ({"x.csv": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"}, TRAIN + "x.csv", ["x.csv is an image", "CSV or JSONL"]),
    "the second of two": ({"x.jsonl": PAIR + b"[]\n"}, TRAIN + "train.jsonl x.jsonl", ["x.jsonl, line 2"]),
    "all smaller than a batch": (
        {"x.jsonl": PAIR, "y.jsonl": OTHER},
        TRAIN + "x.jsonl y.jsonl",
        ["longest of the training data sets has 1 rows", "a batch holds 2"],
    ),
    # labels
    "text for a label": (
        {"x.csv": LABELLED + b"a,0\nb,sport\n"},
        TRAIN + "x.csv --loss BatchAllTripletLoss",
        ["x.csv, line 3, column 'label'", "'sport'", "Number the classes"],
    ),
    "score out of range": (
        {"x.csv": SCORED + b"a,b,0.5\nc,d,4.5\n"},
        TRAIN + "x.csv --loss CosineSimilarityLoss",
        ["x.csv, row 2, column 'score' is 4.5", "from -1 to 1", "divide"],
    ),
    "score for a mark": (
        {"x.csv": SCORED + b"a,b,1\nc,d,0.3\n"},
        TRAIN + "x.csv --loss ContrastiveLoss",
        ["x.csv, row 2, column 'score' is 0.3", "0 or 1", "CoSENTLoss"],
    ),
    "class beyond the last": (
        {"x.csv": b"sentence1,sentence2,label\na,b,0\nc,d,3\n"},
        TRAIN + "x.csv --loss SoftmaxLoss --loss-args num_labels=3",
        ["x.csv, row 2, column 'label' is 3", "below num_labels=3"],
    ),
    # evaluation data of a training run
    "broken evaluation data": (
        {"x.jsonl": PAIR + b"?\n"},
        TRAIN + "train.jsonl --eval-data x.jsonl",
        ["x.jsonl, line 2", "broken JSON"],
    ),
    "one query to compare by": (
        {"x.jsonl": PAIR},
        TRAIN + "train.jsonl --eval-data x.jsonl",
        ["x.jsonl holds one item", "two at least"],
    ),
    "classes beside training": (
        {"x.csv": LABELLED + b"a,0\nb,1\n"},
        TRAIN + "train.jsonl --eval-data x.csv",
        ["x.csv has the columns text, label", "--task clustering"],
    ),
    # a BEIR folder
    "no qrels": (beir(qrels=b""), "evaluate MODEL --data b", ["b/qrels/test.tsv is missing", "qrels/<split>.tsv"]),
    "unknown query": (
        beir(qrels=b"query-id\tcorpus-id\tscore\nq7\td0\t1\n"),
        "evaluate MODEL --data b",
        ["test.tsv, line 2", "query-id 'q7' is not in queries.jsonl"],
    ),
    "unknown document": (
        beir(qrels=b"query-id\tcorpus-id\tscore\nq0\td7\t1\n"),
        "evaluate MODEL --data b",
        ["test.tsv, line 2", "corpus-id 'd7' is not in corpus.jsonl"],
    ),
    "fraction for a grade": (
        beir(qrels=b"query-id\tcorpus-id\tscore\nq0\td0\t0.5\n"),
        "evaluate MODEL --data b",
        ["test.tsv, line 2, column 'score'", "no whole number"],
    ),
    "no header": (beir(qrels=b"q0\td0\t1\n"), "evaluate MODEL --data b", ["test.tsv, line 1", "header"]),
    "duplicate ids": (
        beir(corpus=b'{"_id": "d0", "text": "a"}\n{"_id": "d0", "text": "b"}\n'),
        "evaluate MODEL --data b",
        ["corpus.jsonl, line 2", "_id 'd0' is that of line 1 too"],
    ),
    "broken corpus": (beir(corpus=b'{"_id": "d0"\n'), "evaluate MODEL --data b", ["corpus.jsonl, line 1", "broken"]),
    # other evaluation data
    "equal scores": (
        {"x.csv": SCORED + b"a,b,1\nc,d,1\ne,f,1\n"},
        "evaluate MODEL --data x.csv",
        ["x.csv: All scores are 1"],
    ),
    "task for other columns": (
        {},
        "evaluate MODEL --data dev.jsonl --task sts",
        ["anchor, positive", "task=sts reads"],
    ),
    "task of a folder": (beir(), "evaluate MODEL --data b --task clustering", ["task=clustering: b is a BEIR folder"]),
    "no task": ({"x.csv": LABELLED + b"a,0\nb,1\n"}, "evaluate MODEL --data x.csv", ["--task classification"]),
    "no class number": (
        {"x.csv": LABELLED + b"a,0\nb,0.5\n"},
        "evaluate MODEL --data x.csv --task clustering",
        ["x.csv, row 2, column 'label' is 0.5", "where a class belongs"],
    ),
    "one class": (
        {"x.csv": LABELLED + b"a,1\nb,1\n"},
        "evaluate MODEL --data x.csv --task clustering",
        ["x.csv, column 'label'", "two classes"],
    ),
    "no probe data": (
        {"x.csv": LABELLED + b"a,0\nb,1\n"},
        "evaluate MODEL --data x.csv --task classification",
        ["needs train_data"],
    ),
    "class that the probe never saw": (
        {"x.csv": LABELLED + b"a,0\nb,2\n", "y.csv": LABELLED + b"a,0\nb,1\n"},
        "evaluate MODEL --data x.csv --task classification --train-data y.csv",
        ["x.csv, row 2, column 'label'", "no text of y.csv is of class 2"],
    ),
    "probe data for pairs": (
        {"y.csv": LABELLED + b"a,0\nb,1\n"},
        "evaluate MODEL --data dev.jsonl --train-data y.csv",
        ["train_data=y.csv is for task=classification"],
    ),
    # models
    "model is a file": ({}, "evaluate train.jsonl --data dev.jsonl", ["train.jsonl"]),
    "empty folder": ({"m/notes.txt": b""}, "evaluate m --data dev.jsonl", ["model m could not be loaded"]),
    "broken config": ({"m/config.json": b"{"}, "export m --format merged --out out", ["m/config.json", "valid JSON"]),
    "adapter without its base": (
        {"m/adapter_config.json": b'{"peft_type": "LORA", "base_model_name_or_path": "gone"}'},
        "evaluate m --data dev.jsonl",
        ["gone, which the adapter m names as its base: there is no such folder", "into m/adapter_config.json"],
    ),
    # config files
    "file of a key twice": (
        {"c.yaml": b"model: MODEL\ndata: train.jsonl\nseed: 1\nseed: 2\n"},
        "train c.yaml",
        ["c.yaml, line 4", "'seed' is there twice"],
    ),
    "file of a misspelt key": (
        {"c.yaml": b"model: m\ndata: train.jsonl\nmax-step: 2\n"},
        "train c.yaml",
        ["c.yaml, line 3", "no key 'max_step'", "Did you mean max_steps?"],
    ),
    "file without data": ({"c.yaml": b"model: m\n"}, "train c.yaml", ["c.yaml: data is missing", "--data"]),
    "file that is empty, checked": ({"c.yaml": b"data: train.jsonl\n"}, "check c.yaml", ["c.yaml: model is missing"]),
    "file of data that is not there": (
        {"conf/c.yaml": b"model: m\ndata: train.jsonl\n"},
        "train conf/c.yaml",
        ["conf/train.jsonl: there is no such file"],
    ),
    "file that is a list": ({"c.yaml": b"- model\n"}, "train c.yaml", ["c.yaml holds no keys", "key: value"]),
    "file of a nested mapping": (
        {"c.yaml": b"model: m\ndata: train.jsonl\nprompts: {anchor: {a: b}}\n"},
        "train c.yaml",
        ["line 3: prompts is", "a mapping of names, each to a text"],
    ),
    "file of a text for a weight": (
        {"c.yaml": b"model: m\ndata: [train.jsonl, dev.jsonl]\nweights: {dev: much}\n"},
        "train c.yaml",
        ["line 3: weights is", "each to a number"],
    ),
    "file of weights for one": (
        {"c.yaml": b"model: m\ndata: train.jsonl\nweights: {train: 2}\n"},
        "train c.yaml",
        ["c.yaml, line 3: weights need several data sets"],
    ),
    "file of a strange dtype": (
        {"c.yaml": b"model: m\ndata: train.jsonl\ndtype: float8\n"},
        "train c.yaml",
        ["line 3: dtype=float8 is not known; use one of bfloat16"],
    ),
    "file of a strange task": (
        {"c.yaml": b"model: m\ndata: train.jsonl\neval_data: dev.jsonl\neval_tasks: {dev: guessing}\n"},
        "train c.yaml",
        ["line 4: eval_tasks: dev=guessing", "retrieval, sts, clustering, classification"],
    ),
    "file of a classification without a probe": (
        {"c.yaml": b"model: m\ndata: train.jsonl\neval_data: {dev: dev.jsonl}\neval_tasks: {dev: classification}\n"},
        "train c.yaml",
        ["c.yaml, line 4: eval_tasks: dev=classification needs eval_train_data: dev=FILE"],
    ),
    "file of a probe for something else": (
        {"c.yaml": b"model: m\ndata: train.jsonl\neval_data: dev.jsonl\neval_train_data: {dev: train.jsonl}\n"},
        "train c.yaml",
        ["c.yaml, line 4: eval_train_data: dev is for a classification", "eval_tasks: dev=classification"],
    ),
    "labelled evaluation data without a task": (
        {"x.csv": LABELLED + b"read rows,0\nsort rows,1\n"},
        TRAIN + "train.jsonl --eval-data x.csv",
        ["x.csv has the columns text, label", "clustering or classification", "eval_tasks"],
    ),
    "file and a run": ({"c.yaml": b"model: m\n"}, "train c.yaml --resume r", ["leave config out"]),
    # options
    "quiet JSON": ({}, TRAIN + "train.jsonl --quiet --json", ["quiet and json exclude each other"]),
    "run to go on in another place": ({}, "train --resume r --output s", ["leave output out"]),
    "run of another version": (
        {"r/run.json": b'{"config": {"model": "m", "data": {"a": "train.jsonl"}, "speed": 3}}'},
        "train --resume r",
        ["r/run.json: there is no key 'speed'"],
    ),
    "argument of the Trainer that is not there": (
        {},
        TRAIN + "train.jsonl --training-args weight_decai=0.1",
        ["no argument 'weight_decai'", "Did you mean weight_decay?"],
    ),
    "value that the Trainer refuses": (
        {},
        TRAIN + "train.jsonl --training-args logging_strategy=often",
        ["training_args: the Trainer refuses", "often"],
    ),
    "argument of the adapter that is not there": (
        {},
        TRAIN + "train.jsonl --lora-args use_rs_lora=true",
        ["use_rs_lora", "use_rslora"],
    ),
    "argument with an option": (
        {},
        TRAIN + "train.jsonl --model-args dtype=float32",
        ["model_args: dtype has an option"],
    ),
    "own loss without its arguments": (
        {},
        TRAIN + "train.jsonl dev.jsonl --losses dev=TripletLoss --loss-args dev=3",
        ["loss_args: dev has a loss of its own", "{argument: value}"],
    ),
    "columns of one of several": (
        {},
        TRAIN + "train.jsonl dev.jsonl --columns dev.frage=anchor dev.antwort=positive",
        ["dev.jsonl", "frage=anchor names a column that is not there"],
    ),
    "depth of nothing": (
        {},
        TRAIN + "train.jsonl --eval-data sts.csv --eval-columns sentence1=sentence1 sentence2=sentence2 score=score "
        "--eval-k 3",
        ["eval_k=3 is the depth of retrieval"],
    ),
    "weight that is no number": ({}, TRAIN + "train.jsonl dev.jsonl --weights dev=-1", ["weights: dev=-1.0 must be"]),
    # folders and machines
    "output below a file": (
        {},
        TRAIN + "train.jsonl --output dev.jsonl/run",
        ["output=dev.jsonl/run cannot be made", "dev.jsonl is a file"],
    ),
    "broken run to resume": (
        {"r/run.json": b'{"config": ', "r/checkpoints/checkpoint-1/trainer_state.json": b"{}"},
        "train --resume r",
        ["r/run.json is not what embtune wrote"],
    ),
    "more than the memory": (
        {},
        TRAIN + "train.jsonl --lora-r 1000000000000",
        ["Out of memory", "can't allocate", "smaller --batch-size", "--gradient-checkpointing"],
    ),
}

Run = Callable[[str], tuple[int, str]]


@pytest.fixture
def run(work_dir: Path, tiny_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line; gives exit code and what it said on standard error."""
    model = str(tiny_dir("bert"))

    def run_line(line: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(shlex.split(line.replace("MODEL", model)))
        return code, capsys.readouterr().err

    return run_line


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("mistake", CASES)
def test_one_message_names_place_and_remedy(mistake: str, run: Run, work_dir: Path) -> None:
    files, line, said = CASES[mistake]
    write(work_dir, files)
    before = set(work_dir.rglob("*"))
    code, errors = run(line)
    assert code == 1
    messages = [row for row in errors.splitlines() if not row.startswith("warning: ")]
    assert len(messages) == 1 and messages[0].startswith("error: "), errors
    for part in said:
        assert part in messages[0], errors
    assert len(messages[0]) < 700, errors
    assert set(work_dir.rglob("*")) == before


def test_a_model_folder_that_was_cut_off(run: Run, work_dir: Path, tiny_dir: Callable[..., Path]) -> None:
    for name, keep in (("model.safetensors", 1_000), ("tokenizer.json", 100), ("modules.json", 10)):
        shutil.rmtree(work_dir / "m", ignore_errors=True)
        shutil.copytree(tiny_dir("bert"), work_dir / "m")
        (work_dir / "m" / name).write_bytes((work_dir / "m" / name).read_bytes()[:keep])
        before = set(work_dir.rglob("*"))
        code, errors = run("export m --format merged --out out")
        assert code == 1 and errors.count("\n") == 1, errors
        assert errors.startswith("error: The model m could not be loaded from this folder: "), errors
        assert set(work_dir.rglob("*")) == before


def test_what_must_not_be_read_or_written(
    tiny_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        write(folder, {"train.jsonl": PAIR + OTHER, "locked.jsonl": PAIR})
        (folder / "locked.jsonl").chmod(0)
        (folder / "locked").mkdir(mode=0o555)
        monkeypatch.chdir(folder)
        user = os.geteuid()
        if user == 0:  # the superuser may do everything, so step down to an ordinary user
            os.setresuid(65534, 65534, 0)
        try:
            for line, part in (
                (
                    "--data train.jsonl --output locked/run",
                    f"output=locked/run: nothing can be made in {folder / 'locked'} (Permission denied)",
                ),
                ("--data locked.jsonl", "locked.jsonl: permission denied"),
            ):
                assert main(["train", "--model", "unused", *line.split()]) == 1
                errors = capsys.readouterr().err
                assert errors.startswith("error: ") and errors.count("\n") == 1 and part in errors, errors
        finally:
            if user == 0:
                os.setresuid(0, 0, 0)
        assert sorted(entry.name for entry in folder.iterdir()) == ["locked", "locked.jsonl", "train.jsonl"]


def test_what_is_odd_but_sound_trains_with_a_warning_at_most(run: Run, work_dir: Path) -> None:
    write(
        work_dir, {"x.jsonl": b"\xef\xbb\xbf" + PAIR + OTHER, "dev.jsonl": OTHER + b'{"query": "new", "answer": "x"}\n'}
    )
    code, errors = run(TRAIN + "x.jsonl --eval-data x.jsonl --output run --warmup 0")
    assert code == 0
    assert errors.startswith("warning: 2 of 2 evaluation rows have as query a text that training has seen (rows 1, 2")
    assert errors.count("\n") == 1


def test_what_is_no_lack_of_memory_keeps_its_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBTUNE_VERBOSE", "1")
    with pytest.raises(RuntimeError, match="can't allocate"):
        run(TRAIN + "train.jsonl --lora-r 1000000000000")
