import io
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.trainer
from rich.console import Console
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as all_losses
from torch import nn

from embtune import runtime
from embtune.api import FastSentenceTransformer
from embtune.cli.config import EvaluateConfig, ExportConfig
from embtune.cli.config_file import read_config
from embtune.cli.export_choice import QUANTIZATIONS, ExportChoice
from embtune.cli.loss_choice import make_loss
from embtune.cli.loss_table import LOSS_INPUTS
from embtune.cli.main import main
from embtune.cli.places import DATA_ENDINGS
from embtune.cli.tasks import EvaluationTask
from embtune.cli.train import run_train
from embtune.cli.train_config import DTYPES, TrainConfig
from embtune.cli.train_details import TrainDetails
from embtune.data.formats import READERS
from embtune.errors import ArgumentError
from embtune.export import onnx, openvino
from embtune.export.gguf import GGUF_QUANTIZATIONS
from embtune.export.torchao import MINIMUM_COSINE
from embtune.files import read_json
from embtune.report.events import read_events
from embtune.report.run import read_run
from embtune.train import checkpoint_folders
from embtune.train.checkpoint_folders import is_whole

# PEFT asks transformers for a name it gave up, and torch's loader speaks of pinned memory without an accelerator.
THIRD_PARTY = (
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:'pin_memory' argument is set as true:UserWarning",
)

Train = Callable[[str], dict[str, Any]]


@pytest.fixture
def train(work_dir: Path, tiny_dir: Callable[..., Path]) -> Train:
    """Run `embtune train` with the tiny model (unless the line names another) and give its results.json."""

    def run(line: str) -> dict[str, Any]:
        arguments = ["train", *shlex.split(line)]
        if "--model" not in arguments:
            arguments += ["--model", str(tiny_dir("bert"))]
        assert main(arguments) == 0
        output = arguments[arguments.index("--output") + 1] if "--output" in arguments else "embtune-run"
        return read_json(work_dir / output / "results.json")

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_whole_run(train: Train, work_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = train("--data train.jsonl --eval-data dev.jsonl --batch-size 8 --max-steps 6 --lora-r 4 --output run")
    run = work_dir / "run"
    assert sorted(entry.name for entry in run.iterdir()) == sorted(
        ["checkpoints", "events.jsonl", "merged", "report.html", "results.json", "run.json"]
    )
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<dt>Forgetting check</dt><dd>passed</dd>" in page
    assert results["training"]["steps"] == 6
    assert results["training"]["first_loss"] > 0
    assert results["exports"] == {"merged": "run/merged"}
    change = results["evaluations"]["dev"]["metrics"]["ndcg@10"]
    assert change["difference"] == pytest.approx(change["after"] - change["before"])
    assert change["low"] <= change["difference"] <= change["high"]

    assert results["forgetting"]["metrics"]["ndcg@10"]["items"] == 200
    settings = read_json(run / "run.json")
    assert settings["data"].keys() == {"train"}
    assert {"config", "folder", "git", "machine"} <= settings.keys()
    assert settings["config"]["lora_r"] == 4
    assert settings["config"]["data"] == {"train": "train.jsonl"}
    assert {"torch", "transformers", "device"} <= settings["machine"].keys()

    card = (run / "merged" / "README.md").read_text(encoding="utf-8")
    assert "train.jsonl" in card
    assert "dev.jsonl" in card
    assert f"{change['after']:.4f} (before: {change['before']:.4f}" in card
    assert SentenceTransformer("run/merged", device="cpu").encode(["a text"]).shape == (1, 32)

    captured = capsys.readouterr()
    assert "r=4, alpha=32" in captured.out
    for shown in (
        "train.jsonl: 32 rows",
        "used as",
        "of a padded batch would be padding",
        "memory     about",
        "none found",
    ):
        assert shown in captured.out
    assert "prose did not get worse" in captured.out
    assert "step 6/6  loss" in captured.out
    assert "16 queries and 16 documents from dev.jsonl" in captured.out
    assert "run/results.json" in captured.out
    assert "S('run/merged')" in captured.out


def test_a_config_file_and_flags_that_win_over_it(train: Train, work_dir: Path) -> None:
    (work_dir / "run.yaml").write_text(
        "data: {left: train.jsonl, right: dev.jsonl}\n"
        "eval-data: beir\n"
        "eval_split: dev\n"
        "output: from-file\n"
        "batch_size: 8\n"
        "max_steps: 4\n"
        "learning_rate: 2e-3\n"
        "seed: 3\n"
        "lora_targets: [query, value]\n"
        "prompts: {anchor: 'query: '}\n"
        "matryoshka_dims: [32, 16]\n"
        "loss_args: {scale: 30}\n"
        "load_in_4bit: true\n"
        "exports: ['merged:16bit', 'gguf:f16']\n",
        encoding="utf-8",
    )
    results = train("--config run.yaml --max-steps 2 --no-load-in-4bit --output from-flag")
    config = read_json(work_dir / "from-flag" / "run.json")["config"]
    assert config["max_steps"] == 2
    assert config["learning_rate"] == 2e-3
    assert config["load_in_4bit"] is False
    assert config["data"] == {"left": "train.jsonl", "right": "dev.jsonl"}
    assert config["loss_args"] == {"scale": 30}
    assert results["training"]["steps"] == 2
    assert results["evaluations"]["beir"]["data"] == "beir"
    merged = work_dir / "from-flag" / "merged-16bit"
    assert {tensor.dtype for tensor in weights(merged).values()} <= {torch.float16, torch.bfloat16}
    assert SentenceTransformer(str(merged), device="cpu").prompts["query"] == "query: "
    [gguf] = (work_dir / "from-flag" / "gguf").iterdir()
    assert gguf.read_bytes()[:4] == b"GGUF"


def test_before_and_after_are_measured_with_the_same_prompts(
    train: Train, work_dir: Path, tiny_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--data train.jsonl --eval-data dev.jsonl --batch-size 8 --max-steps 1 --dtype float32 --output run"
    results = train(f"{flags} --prompts anchor='find: ' positive='code: '")
    assert "with these prompts, before and after: query 'find: ', document 'code: '." in capsys.readouterr().out
    prompted = FastSentenceTransformer.from_pretrained(tiny_dir("bert"), dtype="float32", for_inference=True)
    data = EvaluationTask.read("dev.jsonl", {})
    bare = data.run(prompted).metrics["ndcg@10"]
    prompted.prompts.update(query="find: ", document="code: ")
    before = results["evaluations"]["dev"]["metrics"]["ndcg@10"]["before"]
    assert before == pytest.approx(data.run(prompted).metrics["ndcg@10"])
    assert before != pytest.approx(bare)
    scored = "--data train.jsonl --eval-data sts.csv --eval-columns sentence1=sentence1 sentence2=sentence2 score=score"
    train(f"{scored} --batch-size 8 --max-steps 1 --output sts --prompts anchor='find: '")
    assert "Measured without prompts, before and after: sts has no queries" in capsys.readouterr().out


class InterruptedStream(io.StringIO):
    """Presses Ctrl-C whenever one of `texts` is first written."""

    def __init__(self, *texts: str) -> None:
        super().__init__()
        self.texts = list(texts)

    def write(self, text: str) -> int:
        for awaited in [each for each in self.texts if each in text]:
            self.texts.remove(awaited)
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def run_until(config: TrainConfig, *texts: str) -> str:
    """Train until Ctrl-C at these texts; gives the last line of output."""
    stream = InterruptedStream(*texts)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert run_train(config, Console(file=stream, markup=False, width=120)) == 130
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    return stream.getvalue().splitlines()[-1]


def interruptible(tiny: Path) -> TrainConfig:
    return TrainConfig(
        model=str(tiny),
        data={"train": "train.jsonl"},
        eval_data={"dev": "dev.jsonl"},
        output=Path("run"),
        batch_size=8,
        max_steps=6,
        more=TrainDetails(eval_steps=2, save_steps=2, engine="reference", dtype="float32", forgetting_check=False),
    )


SAME_FLAGS = (
    "--data train.jsonl --eval-data dev.jsonl --batch-size 8 --max-steps 6 --eval-steps 2 --save-steps 2 "
    "--engine reference --dtype float32 --no-forgetting-check"
)


@pytest.mark.filterwarnings(*THIRD_PARTY)
def test_a_run_that_ctrl_c_ended_resumes_to_the_same_weights(
    train: Train, work_dir: Path, tiny_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = run_until(interruptible(tiny_dir("bert")), "after step 2:")
    assert said == "Stopped. Saved at step 3. To go on: embtune train --resume run"
    assert "checkpoint-3" in [folder.name for folder in (work_dir / "run" / "checkpoints").iterdir()]
    assert not (work_dir / "run" / "results.json").exists()
    assert read_events(work_dir / "run" / "events.jsonl")[0][-1]["event"] == "interrupted"
    unfinished = work_dir / "run" / "checkpoints" / ".checkpoint-3.abc_4567"  # what kill -9 may leave
    unfinished.mkdir()
    # The data is found again from anywhere, and a run that has no step left takes none.
    (work_dir / "elsewhere").mkdir()
    monkeypatch.chdir(work_dir / "elsewhere")
    for _ in range(2):
        assert main(["train", "--resume", str(work_dir / "run")]) == 0
        assert read_json(work_dir / "run" / "results.json")["training"]["steps"] == 6
    assert not unfinished.exists()
    monkeypatch.chdir(work_dir)
    train(f"{SAME_FLAGS} --output whole")
    resumed, whole = weights(work_dir / "run" / "merged"), weights(work_dir / "whole" / "merged")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.filterwarnings(*THIRD_PARTY)
def test_ctrl_c_with_nothing_to_save_leaves_nothing(work_dir: Path, tiny_dir: Callable[..., Path]) -> None:
    config = interruptible(tiny_dir("bert"))
    for texts in (["Reading dev"], ["Measuring the model"], ["after step 2:", "once more stops at once"]):
        assert run_until(config, *texts) == "Stopped. Nothing was left in run."
        assert not (work_dir / "run").exists()


@pytest.mark.filterwarnings(*THIRD_PARTY)
def test_ctrl_c_twice_loses_nothing_saved(work_dir: Path, tiny_dir: Callable[..., Path]) -> None:
    said = run_until(interruptible(tiny_dir("bert")), "after step 4:", "once more stops at once")
    assert said == "Stopped. Saved at step 2. To go on: embtune train --resume run"


def test_sigterm_saves_a_checkpoint(
    work_dir: Path, tiny_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--data train.jsonl --batch-size 8 --max-steps 100000 --output run"
    command = [
        sys.executable,
        "-u",
        "-m",
        "embtune.cli.main",
        "train",
        "--model",
        str(tiny_dir("bert")),
        *flags.split(),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step "):
                break
        assert main(["train", "--resume", "run"]) == 1
        assert f"output=run: its run is still going on, in process {process.pid}." in capsys.readouterr().err
        process.send_signal(signal.SIGTERM)
        said = process.stdout.read()
    assert process.returncode == 128 + signal.SIGTERM
    assert "Finishing this step and saving a checkpoint; once more stops at once." in said
    saved = re.search(r"Saved at step (\d+)\. To go on: embtune train --resume run", said)
    assert saved is not None
    assert is_whole(work_dir / "run" / "checkpoints" / f"checkpoint-{saved[1]}")


def test_other_rows_are_not_resumed_with(train: Train, work_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("--data train.jsonl --batch-size 8 --max-steps 1 --output run")
    (work_dir / "run" / "results.json").unlink()  # as if it had been stopped before its end
    (work_dir / "train.jsonl").write_text((work_dir / "dev.jsonl").read_text())
    capsys.readouterr()
    assert main(["train", "--resume", "run"]) == 1
    assert "resume: the rows of 'train' are not those that run began with" in capsys.readouterr().err


def test_early_stopping_keeps_the_best(train: Train, work_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # So large a learning rate makes the model worse with every evaluation: the first one is the best.
    results = train(
        "--data train.jsonl --eval-data dev.jsonl --batch-size 8 --max-steps 20 --learning-rate 0.5 --warmup 0 "
        "--eval-steps 1 --early-stopping-patience 2 --dtype float32"
    )
    shown = capsys.readouterr().out.splitlines()
    scores = [float(line.split("ndcg@10 ")[1][:6]) for line in shown if line.startswith("after step")]
    assert results["training"]["steps"] == len(scores) < 20
    assert results["evaluations"]["dev"]["metrics"]["ndcg@10"]["after"] == pytest.approx(max(scores), abs=1e-4)


def test_other_ways_to_train(train: Train, work_dir: Path) -> None:
    train("--data train.jsonl --batch-size 8 --max-steps 1 --full-finetuning --output full")
    assert not list((work_dir / "full" / "checkpoints").rglob("adapter_*"))
    train("--data train.jsonl --batch-size 8 --max-steps 1 --load-in-4bit --output nf4")
    adapter = work_dir / "nf4" / "checkpoints" / "checkpoint-1"
    train(f"--model {adapter} --data train.jsonl --batch-size 8 --max-steps 1 --output further")
    results = train(
        "--data sts.csv --loss CoSENTLoss --eval-data sts.csv --batch-size 4 --epochs 0.6 --exports torchao onnx "
        "--output sts"
    )
    assert results["training"]["steps"] == 2
    assert results["evaluations"]["sts"]["kind"] == "sts"
    folders = {"torchao:int8_weight_only": "sts/torchao-int8_weight_only", "onnx:f32": "sts/onnx-f32"}
    assert results["exports"] == folders
    [*_, exported] = read_run(work_dir / "sts").exports
    assert (exported["format"], exported["parity"]["minimum"] > 0.9999) == ("onnx:f32", True)


def test_an_adapter_takes_no_other_rank(train: Train, work_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("--data train.jsonl --batch-size 8 --max-steps 1")
    adapter = work_dir / "embtune-run" / "checkpoints" / "checkpoint-1"
    line = ["train", "--model", str(adapter), "--data", "train.jsonl", "--batch-size", "8", "--lora-r", "4"]
    assert main([*line, "--output", "further"]) == 1
    assert "leave lora_r out" in capsys.readouterr().err
    assert main(line) == 1
    assert "embtune-run holds an earlier run" in capsys.readouterr().err
    assert not (work_dir / "further").exists()


def test_own_column_names_for_training_and_evaluation(
    train: Train, work_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (anchor, positive) in {"mine": ("frage", "antwort"), "theirs": ("f", "a")}.items():
        rows = [{anchor: f"text {index}", positive: f"answer {index}", "id": index} for index in range(8)]
        (work_dir / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    mine = "--data mine.json --columns frage=anchor antwort=positive --eval-data theirs.json"
    for own in ("", "dev.jsonl --eval-columns theirs.f=anchor theirs.antwort=positive"):
        assert main(["train", "--model", "m", *mine.split(), *own.split()]) == 1
    said = capsys.readouterr().err
    assert "theirs.json has the columns 'f', 'a', 'id', not 'frage', 'antwort' as the training data. Say what" in said
    assert "columns: antwort=positive names a column that is not there" in said
    results = train(f"{mine} sts.csv --eval-columns theirs.f=anchor theirs.a=positive --batch-size 8 --max-steps 1")
    assert results["evaluations"]["theirs"]["metrics"]["ndcg@10"]["items"] == 8
    assert "spearman" in results["evaluations"]["sts"]["metrics"]
    (work_dir / "own.yaml").write_text(
        "model: m\ndata: mine.json\ncolumns: {frage: anchor, antwort: positive}\n"
        "eval_data: [theirs.json, sts.csv]\neval_columns: {theirs.f: anchor, theirs.a: positive}\n"
    )
    assert main(["check", "own.yaml"]) == 1
    assert "8 of 8, 100.0%" in capsys.readouterr().out  # all questions are those that theirs.json measures with


def test_a_file_holds_what_flags_hold(work_dir: Path) -> None:
    (work_dir / "a.yaml").write_text(
        "model: m\ndata: [a.jsonl, b.jsonl]\nepochs: 2\nwarmup: 1e-1\nmax_seq_length: null\nloss_args: {scale: 3}\n"
    )
    config = read_config(work_dir / "a.yaml")
    details = TrainDetails(loss_args={"scale": 3})
    data = {name: str(work_dir / f"{name}.jsonl") for name in "ab"}
    assert config == TrainConfig(model="m", data=data, epochs=2.0, more=details)
    assert config.flat()["warmup"] == 0.1


@pytest.mark.parametrize(
    ("config", "settings", "field"),
    [
        (TrainConfig, {"batch_size": 0}, "batch_size"),
        (TrainConfig, {"learning_rate": 0.0}, "learning_rate"),
        (TrainConfig, {"seed": -1}, "seed"),
        (TrainConfig, {"data": {}}, "data"),
        (TrainConfig, {"exports": ("merged", "merged")}, "exports"),
        (TrainConfig, {"more": TrainDetails(lora_dropout=1.0)}, "lora_dropout"),
        (TrainConfig, {"more": TrainDetails(warmup=1.5)}, "warmup"),
        (TrainConfig, {"more": TrainDetails(eval_steps=2, save_steps=3, early_stopping_patience=1)}, "save_steps"),
        (TrainConfig, {"more": TrainDetails(matryoshka_dims=(8, 0))}, "matryoshka_dims"),
        (EvaluateConfig, {"batch_size": 0}, "batch_size"),
        (ExportConfig, {"quantization": "q2"}, "quantization"),
    ],
)
def test_configs_check_themselves(config: type, settings: dict[str, Any], field: str) -> None:
    needed = {
        TrainConfig: {"model": "m", "data": {"a": "a.jsonl"}},
        EvaluateConfig: {"models": ("m",), "data": "d"},
        ExportConfig: {"model": "m", "format": "gguf", "out": Path("o")},
    }
    with pytest.raises(ArgumentError, match=field):
        config(**{**needed[config], **settings})


def test_the_formats_are_those_of_the_library() -> None:
    assert set(QUANTIZATIONS["gguf"]) == set(GGUF_QUANTIZATIONS)
    assert set(QUANTIZATIONS["torchao"]) == set(MINIMUM_COSINE)
    assert set(QUANTIZATIONS["onnx"]) == set(onnx.MINIMUM_COSINE)
    assert QUANTIZATIONS["openvino"] == openvino.QUANTIZATIONS
    assert str(ExportChoice.parse("gguf")) == "gguf:q8_0"
    assert str(ExportChoice.parse("merged")) == "merged"


def test_every_loss_is_known_or_wraps_another() -> None:
    classes = {name for name in all_losses.__all__ if issubclass(getattr(all_losses, name), nn.Module)}
    assert classes - LOSS_INPUTS.keys() == {"AdaptiveLayerLoss", "MatryoshkaLoss", "Matryoshka2dLoss"}
    assert LOSS_INPUTS.keys() <= classes


@pytest.fixture(scope="module")
def model(tiny_dir: Callable[..., Path]) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_dir("bert")), device="cpu")


def test_losses_with_their_own_arguments(model: SentenceTransformer, tiny_dir: Callable[..., Path]) -> None:
    softmax = make_loss("SoftmaxLoss", {"num_labels": 3}, model)
    assert softmax.classifier.weight.shape == (3, 3 * 32)
    with pytest.warns(DeprecationWarning, match="Symmetric"):
        symmetric = make_loss("MultipleNegativesSymmetricRankingLoss", {"scale": 30}, model)
    assert symmetric.scale == 30
    guided = make_loss("GISTEmbedLoss", {"guide": str(tiny_dir("mpnet")), "temperature": 0.05}, model, (32, 8))
    assert isinstance(guided, all_losses.MatryoshkaLoss)
    assert guided.loss.guide is not model
    with pytest.raises(ArgumentError, match="GISTEmbedLoss needs guide"):
        make_loss("GISTEmbedLoss", {}, model)
    with pytest.raises(ArgumentError, match="margin_strategy"):
        make_loss("GISTEmbedLoss", {"guide": str(tiny_dir("mpnet")), "margin_strategy": "none"}, model)


def test_a_dry_run_shows_everything_and_writes_nothing(
    work_dir: Path, tiny_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(work_dir.rglob("*"))
    line = (
        f"train --model {tiny_dir('bert')} --data train.jsonl --eval-data dev.jsonl --batch-size 8 --epochs 2 --dry-run"
    )
    assert main(line.split()) == 0
    out = capsys.readouterr().out
    assert re.search(r"time +\S+ s for 8 steps of \S+ s\n +measured in steps on random rows", out)
    assert "compile: off" in out
    assert "nothing was trained, nothing written" in out
    assert set(work_dir.rglob("*")) == before


def dry_run(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main([*line.split(), "--dry-run"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_last_line_of_a_dry_run_counts_the_warnings(
    work_dir: Path, tiny_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    train = f"train --model {tiny_dir('bert')} --data train.jsonl --batch-size 8"
    code, out, _ = dry_run(f"{train} --max-steps 4", capsys)
    assert code == 0
    assert out.splitlines()[-1] == "Everything is in order; nothing was trained, nothing written."

    (work_dir / "seen.jsonl").write_text("".join((work_dir / "train.jsonl").read_text().splitlines(True)[:5]))
    code, out, errors = dry_run(f"{train} --max-steps 1 --max-seq-length 4 --eval-data seen.jsonl", capsys)
    assert code == 0
    *_, ready, seen, cut, idle = out.splitlines()
    assert ready == "Ready to train, with 3 warnings; nothing was trained, nothing written:"
    assert "have as query a text that training has seen" in seen
    assert "max_seq_length=4 cuts 100% of the texts" in cut
    assert "The learning rate is 0 in the only step" in idle and "--warmup 0" in idle
    warned = [line for line in errors.splitlines() if line.startswith("warning: ")]
    assert warned == [line.replace("- ", "warning: ", 1) for line in (seen, cut, idle)]


def test_a_dry_run_refuses_what_would_learn_nothing(
    work_dir: Path, tiny_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    train = f"train --model {tiny_dir('bert')} --data train.jsonl"
    code, _, errors = dry_run(f"{train} --batch-size 1", capsys)
    assert code == 1 and "Every batch has one row" in errors
    code, _, errors = dry_run(f"{train} --batch-size 8 --max-seq-length 2", capsys)
    assert code == 1 and "each has 2 special tokens" in errors


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_a_folder_in_which_nothing_can_be_made_is_refused_before_anything_is_read(
    work_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, errors = dry_run("train --model nowhere --data no.jsonl --output /proc/embtune/run", capsys)
    assert code == 1 and not out
    assert errors.startswith("error: output=/proc/embtune/run: nothing can be made in /proc (")
    assert errors.endswith("Give another folder.\n")


def test_json_prints_events_and_quiet_prints_nothing(
    train: Train, work_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--data train.jsonl --batch-size 8 --max-steps 1"
    train(f"{flags} --output run --json")
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events][:3] == ["run", "phase", "preflight"]
    assert events[-1]["event"] == "finished"
    assert events == read_events(work_dir / "run" / "events.jsonl")[0]
    estimate = events[2]["estimate"]
    assert estimate["steps"] == 1 and estimate["memory"] > 0 and not estimate["measured"]
    train(f"{flags} --output quiet --quiet")
    assert capsys.readouterr().out == ""


def test_several_data_sets_each_with_loss_weight_and_columns(train: Train, work_dir: Path) -> None:
    scored = (
        (work_dir / "sts.csv")
        .read_text()
        .replace(",", ";")
        .replace("sentence1", "links")
        .replace("sentence2", "rechts")
    )
    (work_dir / "scored.csv").write_text(scored)
    (work_dir / "conf").mkdir()
    (work_dir / "conf" / "run.yaml").write_text(
        "data: {pairs: ../train.jsonl, scored: ../scored.csv}\n"
        "columns: {scored.links: sentence1, scored.rechts: sentence2, scored.score: score}\n"
        "losses: {scored: CoSENTLoss}\n"
        "loss_args: {scale: 30, scored: {scale: 25}}\n"
        "weights: {pairs: 2, scored: 0.5}\n"
        "eval_data: {dev: ../dev.jsonl, sts: ../sts.csv}\n"
        "eval_columns: {}\n"
        "eval_k: 5\n"
        "eval_steps: 4\n"
        "forgetting_check: false\n"
        "batch_size: 8\n"
        "lora_args: {use_rslora: true}\n"
        "training_args: {weight_decay: 0.01}\n"
        "model_args: {truncate_dim: 16}\n"
        "output: ../run\n"
    )
    results = train("conf/run.yaml --output run")
    # Twice the 4 batches of pairs, and half of the 2 of scored sentences.
    assert results["training"]["steps"] == 9
    assert results["evaluations"].keys() == {"dev", "sts"}
    assert "ndcg@5" in results["evaluations"]["dev"]["metrics"]
    assert "forgetting" not in results
    adapter = read_json(work_dir / "run" / "checkpoints" / "checkpoint-9" / "adapter_config.json")
    assert adapter["use_rslora"] is True
    evaluations = [each for each in read_events(work_dir / "run" / "events.jsonl")[0] if each["event"] == "evaluation"]
    assert {"dev_ndcg@5", "sts_spearman"} <= evaluations[0]["metrics"].keys()


def test_names_that_are_not_imported_are_those_of_the_libraries() -> None:
    assert checkpoint_folders.PREFIX_CHECKPOINT_DIR == transformers.trainer_utils.PREFIX_CHECKPOINT_DIR
    assert checkpoint_folders.TRAINER_STATE_NAME == transformers.trainer.TRAINER_STATE_NAME
    assert set(DATA_ENDINGS) == set(READERS)
    assert set(DTYPES) == set(runtime.DTYPES)
