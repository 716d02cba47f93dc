"""What `embtune train` says of a run that is over, or goes on with other options; and how its figures are had again."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from embtune.cli.main import main
from embtune.cli.parsing import parse_train
from embtune.cli.resuming import about_changes
from embtune.cli.run_folder import RunFolder
from embtune.errors import ArgumentError
from embtune.files import read_json
from embtune.report.events import read_events
from embtune.train.checkpoint_folders import last_whole_checkpoint

FLAGS = (
    "--data train.jsonl --eval-data dev.jsonl --batch-size 8 --max-steps 4 --save-steps 2 --max-seq-length 4 "
    "--learning-rate 1e-2 --dtype float32 --no-forgetting-check --output run"
)


@pytest.fixture
def run(work_dir: Path, tiny_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> Path:
    """The folder of a run whose texts are cut much shorter than the model would."""
    assert main(["train", *FLAGS.split(), "--model", str(tiny_dir("bert"))]) == 0
    return work_dir / "run"


def go_back(run: Path) -> None:
    """Make of a finished run one that stopped after its second step."""
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    shutil.rmtree(run / "merged")
    (run / "results.json").unlink()


def test_the_command_that_a_run_ends_with_gives_its_figures_again(
    run: Path, tiny_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, flags = str(tiny_dir("bert")), ["--data", "dev.jsonl"]
    shown = capsys.readouterr().out.splitlines()
    command = shown[shown.index("Compare both again, as this run did:") + 1].strip()
    assert command == f"embtune evaluate {base} run/merged --data dev.jsonl --max-seq-length 4"
    (run.parent / "run.yaml").write_text(f"model: {base}\ndata: train.jsonl\neval_data: dev.jsonl\nmax_seq_length: 4\n")
    measured = read_json(run / "results.json")["evaluations"]["dev"]["metrics"]
    for line in (shlex.split(command)[1:], ["evaluate", base, "run/merged", "--data", "run.yaml"]):
        assert main([*line, "--json"]) == 0
        captured = capsys.readouterr()
        assert "different lengths" not in captured.err
        found = json.loads(captured.out)
        assert [row["max_seq_length"] for row in found["results"]] == [4, 4]
        for metric, change in found["comparisons"][0]["metrics"].items():
            assert change["before"] == pytest.approx(measured[metric]["before"])
            assert change["after"] == pytest.approx(measured[metric]["after"])
    # Left to themselves the two models read other amounts of each text, and that is said.
    assert main(["evaluate", base, "run/merged", *flags]) == 0
    shown = capsys.readouterr().out
    assert f"different lengths: {base} to 128 tokens, run/merged to 4 tokens. --max-seq-length 4 measures" in shown
    assert [line.split()[-2:] for line in shown.splitlines() if line.endswith(" tokens")] == [
        ["128", "tokens"],
        ["4", "tokens"],
    ]


def test_a_finished_run_is_not_done_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    capsys.readouterr()
    assert main(["train", "--resume", "run"]) == 0
    shown = capsys.readouterr().out
    assert "The run in run is finished: 4 steps, done on 20" in shown
    assert all(place in shown for place in ("run/results.json", "run/report.html", "run/merged"))
    assert "without effect" not in shown
    assert main(["train", "--resume", "run", "--batch-size", "4", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "without effect on it: batch_size" in captured.err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert not RunFolder(run).finished({"epochs": None, "max_steps": 6})


def test_other_options_are_said_with_what_follows(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go_back(run)
    capsys.readouterr()
    assert main(["train", "--resume", "run", "--lora-r", "4"]) == 1
    assert "lora_r 16 -> 4: what the checkpoint holds would not fit" in capsys.readouterr().err
    flags = ["--batch-size", "4", "--learning-rate", "0.5", "--scheduler", "cosine"]
    assert main(["train", "--resume", "run", *flags, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert main(["train", "--resume", "run", *flags]) == 0
    shown = capsys.readouterr().out
    changes = [line for line in shown.splitlines() if line.startswith("- ")]
    assert len(changes) == 3
    assert set(changes) <= set(planned.splitlines())
    assert "rows in a step 8 -> 4: the run goes on as if its 2 steps had been of the new size, so about 8 rows" in shown
    assert "learning_rate 0.01 -> 0.5: without effect" in shown
    assert "\n- scheduler linear -> cosine.\n" in shown
    assert "for 2 steps of" in shown  # the time of those that are left
    rates = [event["learning_rate"] for event in read_events(run / "events.jsonl")[0] if event["event"] == "log"]
    assert max(rates) <= 0.01


def test_rows_skipped_and_lengths() -> None:
    before = {"batch_size": 8, "epochs": 1.0, "training_args": {"gradient_accumulation_steps": 2}}
    now = {"batch_size": 32, "epochs": 2.0, "training_args": {}}
    rows, epochs, arguments = about_changes(before, now, list(now), step=10)
    assert rows.startswith("rows in a step 16 -> 32: ") and "about 160 rows that were not seen yet are skipped" in rows
    assert epochs.startswith("epochs 1.0 -> 2.0: the learning rate takes the course")
    assert arguments == "training_args {'gradient_accumulation_steps': 2} -> –."
    assert list(about_changes(before, before, [], step=10)) == []


def test_a_checkpoint_that_was_cut_off_later_is_passed_over(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a full disk, or by a copy that broke off."""
    shutil.rmtree(run / "merged")
    (run / "results.json").unlink()
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        [file] = (run / "checkpoints" / "checkpoint-4").rglob(name)
        whole = file.read_bytes()
        file.write_bytes(whole[:-10])
        assert last_whole_checkpoint(run / "checkpoints").name == "checkpoint-2"
        file.write_bytes(whole)
    assert last_whole_checkpoint(run / "checkpoints").name == "checkpoint-4"
    file.write_bytes(whole[:100])
    assert main(["train", "--resume", "run"]) == 0
    assert "for 2 steps of" in capsys.readouterr().out


def test_a_flag_for_the_length_takes_the_place_of_what_a_file_says_of_it(work_dir: Path) -> None:
    (work_dir / "run.yaml").write_text("model: MODEL\ndata: train.jsonl\nepochs: 2\n")
    assert parse_train(["run.yaml"]).epochs == 2
    steps = parse_train(["run.yaml", "--max-steps", "7"])
    assert (steps.epochs, steps.max_steps) == (None, 7)
    assert parse_train(["run.yaml", "--epochs", "3"]).epochs == 3
    with pytest.raises(ArgumentError, match="exclude each other"):
        parse_train(["run.yaml", "--epochs", "3", "--max-steps", "7"])
