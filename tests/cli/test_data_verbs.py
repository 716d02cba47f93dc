"""`embtune mine`, `embtune check` and `embtune init`, as a user types them."""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from embtune.cli.config_file import read_config
from embtune.cli.main import main
from embtune.cli.train_config import COMMAND_OPTIONS, TrainConfig
from embtune.cli.train_details import TrainDetails
from embtune.data.readers import read_dataset

Run = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def run(work_dir: Path, tiny_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in `work_dir`, MODEL being a tiny one; gives exit code, output and errors."""
    model = str(tiny_dir("bert"))

    def run_line(line: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(shlex.split(line.replace("MODEL", model)))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_line


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("verb", ["mine", "check", "init"])
def test_help_fits_a_screen(verb: str, run: Run) -> None:
    code, out, errors = run(f"{verb} --help")
    assert (code, errors) == (0, "")
    assert 10 <= out.count("\n") <= 46
    assert max(map(len, out.splitlines())) <= 120


def test_mined_negatives_train(run: Run, work_dir: Path) -> None:
    code, out, _ = run("mine train.jsonl --model MODEL --out mined/train.jsonl --negatives 2 --relative-margin None")
    assert code == 0
    assert "32 rows with anchor, positive, negative_1, negative_2, from 32 rows and 32 documents." in out
    assert [path.name for path in (work_dir / "mined").iterdir()] == ["train.jsonl"]
    [command] = re.findall(r"embtune (train .*)", out)
    code, out, _ = run(f"{command} --batch-size 8 --max-steps 1 --output run")
    assert code == 0
    assert "32 rows with anchor, positive, negative_1, negative_2." in out


def test_mining_twice_gives_the_same_file(run: Run, work_dir: Path) -> None:
    command = (
        "mine train.jsonl --model MODEL --relative-margin None --corpus beir --range-max 12 --output-format triplet"
    )
    assert run(f"{command} --out one.jsonl")[0] == run(f"{command} --out two.jsonl")[0] == 0
    assert (work_dir / "one.jsonl").read_bytes() == (work_dir / "two.jsonl").read_bytes()
    corpus = {row["text"] for row in lines(work_dir / "beir" / "corpus.jsonl")}
    assert corpus & {row["negative"] for row in lines(work_dir / "one.jsonl")}


def test_check_says_what_is_wrong_and_fix_takes_it_out(run: Run, work_dir: Path) -> None:
    train = work_dir / "train.jsonl"
    clean = train.read_text(encoding="utf-8")
    code, out, _ = run("check train.jsonl")
    assert (code, out.splitlines()[-1]) == (0, "Nothing found.")
    bad = [
        clean.splitlines()[0],
        '{"anchor": "", "positive": "x"}',
        (work_dir / "dev.jsonl").read_text().splitlines()[3],
    ]
    train.write_text(clean + "\n".join(bad) + "\n", encoding="utf-8")
    before = train.read_bytes()
    code, out, _ = run(
        "check train.jsonl --eval dev.jsonl beir --eval-split dev --model MODEL --fix --near-duplicates 1"
    )
    assert "- Rows that cannot be used: 1 of 35 (line 34, column 'anchor' is an empty text" in out
    assert (
        "- Rows that repeat an earlier row: 1 of 34, 2.9% (line 33). One of each is enough. [--fix removes them]" in out
    )
    assert "- Rows that have as anchor a text that dev.jsonl measures with: 1 of 34, 2.9% (line 35)." in out
    assert "- Rows that have as anchor a text that beir measures with: 1 of 34, 2.9% (line 35)." in out
    assert "Saved 32 of 35 rows as train.clean.jsonl" in out
    assert code == 0
    assert train.read_bytes() == before
    assert lines(work_dir / "train.clean.jsonl") == [json.loads(line) for line in clean.splitlines()]
    assert run("check train.jsonl")[0] == 1


def test_check_counts_the_tokens_of_a_model(run: Run) -> None:
    code, out, _ = run("check train.jsonl --model MODEL --max-seq-length 12 --fix --out fixed.jsonl")
    found = re.search(r"Rows that have as positive a text of more than 12 tokens of \S+: (\d+) of 32", out)
    assert found is not None
    assert int(found[1]) > 0
    assert code == 1  # such rows stay
    assert "Saved 32 of 32 rows" in out


def test_init_writes_a_config_that_trains(run: Run, work_dir: Path) -> None:
    code, out, _ = run("init train.jsonl --model MODEL --out run/my.yaml")
    assert code == 0
    assert "CONFIRM" not in out
    config = read_config(work_dir / "run" / "my.yaml")
    assert (config.batch_size, config.loss) == (32, "MultipleNegativesRankingLoss")
    assert run("train run/my.yaml --max-steps 1 --output trained")[0] == 0
    assert json.loads((work_dir / "trained" / "run.json").read_text())["config"]["batch_size"] == 32


def test_init_explains_every_key_and_shows_its_default(run: Run, work_dir: Path) -> None:
    run("init train.jsonl --model MODEL")
    text = (work_dir / "config.yaml").read_text(encoding="utf-8")
    names = {each.name for owner in (TrainConfig, TrainDetails) for each in fields(owner)} - {*COMMAND_OPTIONS, "more"}
    block = re.compile(r"(?:^# .+\n)+?(?:# )?(\w+):.*\n", re.MULTILINE)
    assert names <= set(block.findall(text))
    # With every key in force, the config is the default one but for what init has filled in.
    in_force = re.sub(r"^# (?=\w+:( |$)|- )", "", text[text.index("\n\n") :], flags=re.MULTILINE)
    (work_dir / "all.yaml").write_text(in_force, encoding="utf-8")
    assert yaml.safe_load(in_force).keys() == names
    assert read_config(work_dir / "all.yaml") == read_config(work_dir / "config.yaml")


def test_init_asks_to_confirm_what_it_guessed(run: Run, work_dir: Path) -> None:
    odd = 'nr,frage,"antwort: lang"\n1,Was?,"Ein # Zeichen,\n\u2028und noch eins"\n2,"\u0085 Wer?",Jemand mit Text\n'
    (work_dir / "odd.csv").write_text(odd, encoding="utf-8")
    code, out, _ = run("init odd.csv --model MODEL")
    assert code == 0
    assert "CONFIRM" in out
    config = read_config(work_dir / "config.yaml")
    assert config.columns == {"frage": "anchor", "antwort: lang": "positive"}
    text = (work_dir / "config.yaml").read_text(encoding="utf-8")
    assert "# CONFIRM: the names do not tell the roles" in text
    assert "#   'nr' is not used" in text
    assert read_dataset(str(config.data["odd"]), columns=config.columns)["anchor"][0] == "Was?"
    code, out, _ = run("init odd.csv --model MODEL --columns nr=anchor frage=positive --force")
    assert code == 0
    assert "CONFIRM" not in out
    assert read_config(work_dir / "config.yaml").columns == {"nr": "anchor", "frage": "positive"}


@pytest.mark.parametrize(
    ("rows", "loss"),
    [
        ('{"sentence1": "a", "sentence2": "b", "score": 0.5}', "CoSENTLoss"),
        ('{"text": "a", "label": 1}', "BatchAllTripletLoss"),
    ],
)
def test_init_chooses_a_loss_that_reads_the_columns(rows: str, loss: str, run: Run, work_dir: Path) -> None:
    (work_dir / "rows.jsonl").write_text(rows, encoding="utf-8")
    assert run("init rows.jsonl")[0] == 0
    assert read_config(work_dir / "config.yaml").loss == loss


def test_check_and_mine_read_a_config(run: Run, work_dir: Path) -> None:
    rows = [json.loads(line) for line in (work_dir / "train.jsonl").read_text().splitlines()]
    cells = [f"{number};{row['anchor']};{row['positive']}" for number, row in enumerate(rows)]
    (work_dir / "odd.csv").write_text("nr;frage;antwort\n" + "\n".join([*cells, cells[0]]) + "\n")
    (work_dir / "conf").mkdir()
    (work_dir / "conf" / "run.yaml").write_text(
        "model: MODEL\ndata: ../odd.csv\ncolumns: {frage: anchor, antwort: positive}\neval_data: ../beir\n"
        "eval_split: dev\n"
    )
    code, out, _ = run("check conf/run.yaml")
    assert code == 1
    assert "33 rows, cells separated by semicolons." in out
    assert "Rows that repeat an earlier row: 1 of 33" in out
    code, out, _ = run("evaluate MODEL --data conf/run.yaml")
    assert code == 0
    assert "Measuring on 16 queries and 16 documents from beir." in out
    code, out, _ = run("mine conf/run.yaml --model MODEL --relative-margin None --out mined.jsonl")
    assert code == 0
    assert lines(work_dir / "mined.jsonl")[0]["anchor"] == rows[0]["anchor"]


def test_what_is_there_is_replaced_on_demand_only(run: Run, work_dir: Path) -> None:
    for line in (
        "mine train.jsonl --model MODEL --relative-margin None --out out.jsonl",
        "check train.jsonl --fix --out out.jsonl",
        "init train.jsonl --out out.yaml",
        "export MODEL --format merged --out out",
    ):
        for name in ("out.jsonl", "out.yaml"):
            (work_dir / name).write_text("mine\n")
        (work_dir / "out").mkdir(exist_ok=True)
        (work_dir / "out" / "notes.txt").write_text("mine\n")
        code, _, errors = run(line)
        assert code == 1
        assert "is there already" in errors and "--overwrite" in errors
        assert run(f"{line} --overwrite")[0] == 0, line
    assert sorted(path.name for path in (work_dir / "out").iterdir())[-2:] == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (work_dir / "out" / "notes.txt").exists()


MISTAKES = {
    "no output": ("mine train.jsonl --model MODEL", "--out"),
    "output of another format": ("mine train.jsonl --model MODEL --out mined.csv", "must end in .jsonl"),
    "output is the input": ("mine train.jsonl --model MODEL --out train.jsonl", "is what is read"),
    "output is a folder": ("mine train.jsonl --model MODEL --out folder.jsonl", "is a folder; give a file"),
    "output below a file": ("mine train.jsonl --model MODEL --out sts.csv/mined.jsonl", "sts.csv"),
    "impossible ranks": (
        "mine train.jsonl --model MODEL --out m.jsonl --range-min 9 --range-max 9",
        "--range-min=9 and --range-max=9 leave 0 candidates for --num-negatives=3. Raise --range-max.",
    ),
    "impossible margin": (
        "mine train.jsonl --model MODEL --out m.jsonl --absolute-margin -1",
        "--absolute-margin=-1.0",
    ),
    "nothing found": ("mine train.jsonl --model MODEL --out m.jsonl --max-score -0.99", "No row got 3 negatives"),
    "column without corpus": (
        "mine train.jsonl --model MODEL --out m.jsonl --corpus-column x",
        "--corpus-column=x needs --corpus",
    ),
    "no model": ("mine train.jsonl --out m.jsonl", "name the model that ranks"),
    "several data sets of a config": ("mine two.yaml --out m.jsonl", "names the data sets a, b"),
    "one file for several": ("check two.yaml --fix --out fixed.jsonl", "names 2 data sets"),
    "nothing to measure on": ("evaluate MODEL --data two.yaml", "must name one data set as eval_data"),
    "broken config to check": ("check there.yaml", "there.yaml: data is missing"),
    "no such corpus": ("mine train.jsonl --model MODEL --out m.jsonl --corpus no.jsonl", "no.jsonl"),
    "labels to mine for": ("mine sts.csv --model MODEL --out m.jsonl", "not sentence1, sentence2, score"),
    "no such model to mine with": ("mine train.jsonl --model nowhere --out m.jsonl", "nowhere"),
    "no data to check": ("check no.jsonl", "there is no such file"),
    "fixed file is the input": ("check train.jsonl --fix --out train.jsonl", "is what is read"),
    "out without fix": ("check train.jsonl --out fixed.jsonl", "give --fix too"),
    "length without model": ("check train.jsonl --max-seq-length 9", "name one (--model)"),
    "share out of range": ("check train.jsonl --near-duplicates 0", "near_duplicates=0.0"),
    "split of nothing": ("check train.jsonl --eval-split test", "--eval-split=test needs a BEIR folder"),
    "split of a file": ("check train.jsonl --eval dev.jsonl --eval-split test", "--eval-split=test needs a BEIR"),
    "columns of a folder": ("check train.jsonl --eval beir --eval-columns q=anchor", "need a file"),
    "evaluation without the split": ("check train.jsonl --eval beir", "test.tsv is missing"),
    "columns of nothing": ("check train.jsonl --columns frage=anchor", "frage=anchor names a column"),
    "config is there": ("init train.jsonl --out there.yaml", "--overwrite to replace it"),
    "config of another ending": ("init train.jsonl --out config.json", "must end in .yaml"),
    "broken row in init": ("init broken.jsonl", "line 2, column 'positive' is empty"),
    "one column in init": ("init single.jsonl", "training needs two columns of text"),
    "no role in init": ("init train.jsonl --columns anchor=query", "no role 'query'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_message_and_leaves_nothing(mistake: str, run: Run, work_dir: Path) -> None:
    line, part = MISTAKES[mistake]
    (work_dir / "folder.jsonl").mkdir()
    (work_dir / "there.yaml").write_text("model: mine\n")
    (work_dir / "two.yaml").write_text("model: mine\ndata: {a: train.jsonl, b: dev.jsonl}\n")
    (work_dir / "broken.jsonl").write_text('{"anchor": "a", "positive": "b"}\n{"anchor": "a", "positive": null}\n')
    (work_dir / "single.jsonl").write_text('{"thing": "a"}\n')
    before = {path: path.read_bytes() for path in work_dir.rglob("*") if path.is_file()}
    code, _, errors = run(line)
    message = " ".join(re.sub("[│─╭╮╰╯]", " ", errors).split())
    assert part in message
    assert code in (1, 2)
    assert "Traceback" not in errors
    assert code == 2 or (errors.startswith("error: ") and errors.count("\n") == 1)
    assert {path: path.read_bytes() for path in work_dir.rglob("*") if path.is_file()} == before
