import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers.utils import logging as transformers_logging

import embtune
from embtune.cli.main import main
from embtune.cli.parsing import parse_train

# What is wrong -> (command line, part of the message). MODEL is a good one; the data are those of `work_dir`.
MISTAKES = {
    "no such verb": ("trian", "there is no command 'trian'. Did you mean `embtune train`?"),
    "nothing like a verb": ("xyz", "there is no command 'xyz'. There are demo, init, check"),
    "no verb": ("--version2", "VERB"),
    "no model": ("train --data train.jsonl", "--model"),
    "no data": ("train --model MODEL", "--data"),
    "data without a value": ("train --model MODEL --data", "data names no file"),
    "unknown flag": ("train --model MODEL --data train.jsonl --batchsize 8", "--batch-size"),
    "flag twice": ("train --model MODEL --data train.jsonl --data dev.jsonl", "--data is given twice"),
    "a word for a number": ("train --model MODEL --data train.jsonl --batch-size many", "--batch-size"),
    "number out of range": ("train --model MODEL --data train.jsonl --lora-r 0", "lora_r=0"),
    "no number": ("train --model MODEL --data train.jsonl --learning-rate nan", "learning_rate=nan"),
    "hidden option out of range": ("train --model MODEL --data train.jsonl --warmup -1", "warmup=-1"),
    "unknown choice": ("train --model MODEL --data train.jsonl --engine fast", "'fast'"),
    "epochs and steps": ("train --model MODEL --data train.jsonl --epochs 1 --max-steps 2", "exclude each other"),
    "4 bits of everything": (
        "train --model MODEL --data train.jsonl --full-finetuning --load-in-4bit",
        "load_in_4bit and full_finetuning",
    ),
    "rank without adapters": ("train --model MODEL --data train.jsonl --full-finetuning --lora-r 8", "lora_r"),
    "patience without evaluation": (
        "train --model MODEL --data train.jsonl --eval-data dev.jsonl --early-stopping-patience 2",
        "set eval_steps too",
    ),
    "evaluation without data": ("train --model MODEL --data train.jsonl --eval-steps 2", "eval_steps needs eval_data"),
    "unknown format": ("train --model MODEL --data train.jsonl --exports coreml", "'coreml' is no format"),
    "unknown quantisation": ("train --model MODEL --data train.jsonl --exports gguf:q4_k_m", "'q4_k_m'"),
    "format for another architecture": (
        "train --model MPNET --data train.jsonl --batch-size 8 --exports merged gguf",
        "mpnet model cannot be saved as GGUF",
    ),
    "no such file": ("train --model MODEL --data trian.jsonl", "Did you mean train.jsonl"),
    "one of two data sets is missing": ("train --model MODEL --data a=train.jsonl b=no.jsonl", "no.jsonl"),
    "two data sets of one name": ("train --model MODEL --data train.jsonl beir/train.jsonl", "called 'train'"),
    "no such model": ("train --model nowhere --data train.jsonl --batch-size 8", "nowhere"),
    "fewer rows than a batch": ("train --model MODEL --data train.jsonl --batch-size 33", "32 rows"),
    "column that is not there": (
        "train --model MODEL --data train.jsonl --columns q=anchor p=positive",
        "q=anchor names a column",
    ),
    "role that is not there": ("train --model MODEL --data train.jsonl --columns anchor=query", "no role 'query'"),
    "no pair": ("train --model MODEL --data train.jsonl --columns anchor", "'anchor' must be written NAME=VALUE"),
    "unknown loss": (
        "train --model MODEL --data train.jsonl --loss MultipleNegativeRankingLoss",
        "Did you mean MultipleNegativesRankingLoss?",
    ),
    "loss that needs a score": ("train --model MODEL --data train.jsonl --loss CoSENTLoss", "a label or score"),
    "loss that reads no score": ("train --model MODEL --data sts.csv --batch-size 4", "no label or score"),
    "unknown argument of the loss": (
        "train --model MODEL --data train.jsonl --batch-size 8 --loss-args scal=3",
        "Did you mean scale?",
    ),
    "text for a number in the loss": (
        "train --model MODEL --data train.jsonl --batch-size 8 --loss-args scale=high",
        "scale='high'",
    ),
    "value that cannot be read": ("train --model MODEL --data train.jsonl --loss-args scale=[", "scale=["),
    "function for the loss": (
        "train --model MODEL --data train.jsonl --batch-size 8 --loss-args similarity_fct=dot",
        "only a Python program can give",
    ),
    "missing argument of the loss": (
        "train --model MODEL --data sts.csv --batch-size 4 --loss SoftmaxLoss",
        "SoftmaxLoss needs num_labels",
    ),
    "dimension beyond the model's": (
        "train --model MODEL --data train.jsonl --batch-size 8 --matryoshka-dims 64",
        "64 is more than the 32",
    ),
    "prompt without a column": (
        "train --model MODEL --data train.jsonl --prompts query=Q",
        "there is no column 'query'",
    ),
    "layer that is not there": (
        "train --model MODEL --data train.jsonl --batch-size 8 --lora-targets foo",
        "target_modules=['foo']",
    ),
    "unknown tracker": (
        "train --model MODEL --data train.jsonl --batch-size 8 --report-to tensorbord",
        "'tensorbord'",
    ),
    "output is a file": ("train --model MODEL --data train.jsonl --output dev.jsonl", "dev.jsonl is a file"),
    "nothing to resume": ("train --resume embtune-run", "holds no run"),
    "evaluation data of another kind": (
        "train --model MODEL --data train.jsonl --batch-size 8 --eval-data sts.csv --eval-columns sentence1=text",
        "nothing can be measured",
    ),
    "folder that is no BEIR folder": ("evaluate MODEL --data beir/qrels", "is missing"),
    "split that is not there": ("evaluate MODEL --data beir", "split='dev'"),
    "split of a file": ("evaluate MODEL --data dev.jsonl --split dev", "a file has no splits"),
    "nothing to evaluate": ("evaluate --data dev.jsonl", "at least one model"),
    "the same model twice": ("evaluate MODEL MODEL --data dev.jsonl", "named twice"),
    "columns of a BEIR folder": ("evaluate MODEL --data beir --split dev --columns a=anchor", "BEIR folder"),
    "depth of similarity": ("evaluate MODEL --data sts.csv --k 3", "k=3 is the depth of retrieval"),
    "depth out of range": ("evaluate MODEL --data dev.jsonl --k 0", "k=0"),
    "dtype that is not there": ("evaluate MODEL --data dev.jsonl --dtype int4", "dtype='int4'"),
    "no format": ("export MODEL --out out", "--format"),
    "quantisation of another format": (
        "export MODEL --format gguf --out out --quantization int8_dynamic",
        "gguf has no quantization 'int8_dynamic'",
    ),
    "export of another architecture": ("export MPNET --format gguf --out out", "mpnet model cannot"),
    "export into a file": ("export MODEL --format merged --out dev.jsonl", "dev.jsonl is a file"),
    "export into a file's folder": ("export MODEL --format merged --out dev.jsonl/model", "dev.jsonl"),
    "export onto itself": ("export MODEL --format merged --out MODEL", "own folder"),
    "export of nothing": ("export nowhere --format merged --out out", "nowhere"),
    "demo's own checks": ("demo --minutes 0", "--minutes 0.0"),
}

# What is wrong with a config file -> (its text, part of the message).
BAD_FILES = {
    "unknown key": (
        "model: MODEL\ndata: train.jsonl\nbatch_sise: 8\n",
        "line 3: there is no key 'batch_sise'. Did you",
    ),
    "wrong type": ("model: MODEL\nbatch_size: many\n", "line 2: batch_size is 'many', but must be a whole number"),
    "a number for a switch": (
        "model: MODEL\nload_in_4bit: 1\n",
        "line 2: load_in_4bit is 1, but must be true or false",
    ),
    "a text for a list": ("exports: merged\n", "line 1: exports is 'merged', but must be a list, each item a text"),
    "a list for a mapping": ("columns: [anchor]\n", "line 1: columns is ['anchor'], but must be a mapping of names"),
    "unknown choice": ("model: MODEL\nengine: fast\n", "must be one of auto, packed, reference"),
    "number for a text": ("model: 12\n", "line 1: model is 12, but must be a text"),
    "value out of range": ("model: MODEL\ndata: train.jsonl\nbatch_size: 0\n", "batch_size=0"),
    "unclosed list": ("model: MODEL\ndata: [train.jsonl\nseed: 3\n", "line 3, column 5"),
    "a tab": ("model: MODEL\n\tdata: train.jsonl\n", "line 2, column 1"),
    "the same key twice": ("model: MODEL\nmodel: MODEL\n", "line 2: the key 'model' is there twice"),
    "no keys": ("- model\n", "holds no keys"),
    "a Python object": ("model: !!python/object:os.system x\n", "line 1: this is no YAML that can be read"),
    "a date that is none": ("model: 2024-13-45\n", "line 1: month must be in 1..12"),
    "a key of the command": ("resume: true\n", "there is no key 'resume'"),
    "not UTF-8": (b"model: caf\xe9\n", "line 1: byte 11"),
    "two data sets of one name": ("data: [train.jsonl, beir/train.jsonl]\n", "line 1: Two data sets are called"),
    "data without names": ("model: MODEL\ndata: {a: 3}\n", "line 2: data is"),
}


@pytest.fixture
def run(
    work_dir: Path, tiny_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, str, str]]:
    """Run a command line; gives exit code, output and errors, the last free of frames and line breaks."""

    bert, mpnet = str(tiny_dir("bert")), str(tiny_dir("mpnet"))

    def run_line(line: str) -> tuple[int, str, str]:
        line = line.replace("MODEL", bert).replace("MPNET", mpnet)
        capsys.readouterr()
        code = main(shlex.split(line))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_line


def unframed(text: str) -> str:
    return " ".join(re.sub("[│─╭╮╰╯]|--{3,}", " ", text).split())


def assert_one_message(code: int, errors: str, part: str) -> None:
    message = unframed(errors)
    assert code in (1, 2)
    assert part in message
    assert "Traceback" not in message
    if code == 1:
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1
    else:
        # What tyro says is framed; what argparse says is not.
        assert message.count("For full helptext, ") == 1 or errors.startswith("usage: ")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_message_and_leaves_nothing(
    mistake: str, run: Callable[[str], tuple[int, str, str]], work_dir: Path
) -> None:
    line, part = MISTAKES[mistake]
    before = set(work_dir.rglob("*"))
    code, _, errors = run(line)
    assert_one_message(code, errors, part)
    assert set(work_dir.rglob("*")) == before


@pytest.mark.parametrize("mistake", BAD_FILES)
def test_a_bad_config_file_gives_one_message_and_leaves_nothing(
    mistake: str, run: Callable[[str], tuple[int, str, str]], work_dir: Path
) -> None:
    text, part = BAD_FILES[mistake]
    file = work_dir / "run.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = set(work_dir.rglob("*"))
    code, _, errors = run("train --config run.yaml --model MODEL --data train.jsonl")
    assert_one_message(code, errors, part)
    assert "run.yaml" in errors
    assert set(work_dir.rglob("*")) == before


MANY = """model: MODEL
data: {a: train.jsonl, b: dev.jsonl}
batch_sise: 8
lora_r: 0
learning_rate: many
epochs: 1
max_steps: 3
loss: MultipleNegativeRankingLoss
losses: {c: CoSENTLoss}
weights: {a: 0}
eval_steps: 3
training_args: {seed: 3}
lora_args: {r: 3}
exports: [coreml, merged]
"""


def test_all_mistakes_of_a_file_are_listed_at_once(run: Callable[[str], tuple[int, str, str]], work_dir: Path) -> None:
    (work_dir / "run.yaml").write_text(MANY)
    code, out, errors = run("train run.yaml")
    first, *listed = errors.splitlines()
    assert (code, out, first) == (1, "", "error: 11 mistakes:")
    parts = (
        *("line 3: there is no key 'batch_sise'. Did you mean batch_size?", "line 4: lora_r=0 must be at least 1."),
        *("line 5: learning_rate is 'many'", "line 6: epochs=1.0 and max_steps=3 exclude each other"),
        *("line 8: loss: there is no loss 'MultipleNegativeRankingLoss'. Did you mean MultipleNegativesRankingLoss?",),
        *("line 9: losses: data has no data set 'c'; it has a, b.", "line 10: weights: a=0.0 must be more than 0."),
        *("line 11: eval_steps needs eval_data.", "line 12: training_args: seed has an option of its own: seed."),
        *("line 13: lora_args: r has an option of its own: lora_r.", "line 14: exports: 'coreml' is no format"),
    )
    for part in parts:
        assert sum(f"- run.yaml, {part}" in line for line in listed) == 1, part


def test_mistakes_name_flags_and_lines_where_they_are(
    run: Callable[[str], tuple[int, str, str]], work_dir: Path
) -> None:
    (work_dir / "run.yaml").write_text("data: train.jsonl\neval_steps: 3\nlora_r: 0\n")
    code, _, errors = run("train run.yaml --batch-size 0 --eval-data dev.jsonl --model m")
    assert code == 1
    assert (
        errors
        == "error: 2 mistakes:\n- batch_size=0 must be at least 1.\n- run.yaml, line 3: lora_r=0 must be at least 1.\n"
    )
    code, _, errors = run("train run.yaml --lora-r 8 --eval-data dev.jsonl")
    assert (code, errors) == (1, "error: run.yaml: model is missing. Write it into the file, or give --model.\n")


def test_flags_complete_a_file(work_dir: Path) -> None:
    (work_dir / "run.yaml").write_text("data: train.jsonl\neval_steps: 3\nearly_stopping_patience: 2\n")
    config = parse_train(["run.yaml", "--eval-data", "dev.jsonl", "--model", "m"])
    assert (config.eval_data, config.more.eval_steps) == ({"dev": "dev.jsonl"}, 3)


def test_paths_of_a_file_start_from_its_folder(work_dir: Path) -> None:
    (work_dir / "conf").mkdir()
    (work_dir / "conf" / "base").mkdir()
    (work_dir / "conf" / "run.yaml").write_text(
        "model: base\ndata: [../train.jsonl, gone.jsonl, owner/name]\neval_data: ../beir\noutput: out\n"
        "loss: GISTEmbedLoss\nloss_args: {guide: owner/guide}\n"
    )
    config = parse_train(["conf/run.yaml", "--eval-data", "dev.jsonl"])
    assert config.model == "conf/base"
    assert config.data == {"train": "conf/../train.jsonl", "gone": "conf/gone.jsonl", "name": "owner/name"}
    assert config.eval_data == {"dev": "dev.jsonl"}
    assert config.output == Path("conf/out")
    assert config.more.loss_args == {"guide": "owner/guide"}


REFUSED_EARLY = (
    "train --model m --data bad.jsonl",
    "check bad.csv",
    "mine bad.jsonl --model m --out m.jsonl",
    "init bad.csv",
)


@pytest.mark.parametrize("line", REFUSED_EARLY)
def test_mistakes_in_data_are_told_before_torch_is_imported(line: str, work_dir: Path) -> None:
    (work_dir / "bad.jsonl").write_text("{")
    (work_dir / "bad.csv").write_text('anchor,positive\na,"b\n')
    code = (
        "import sys; from embtune.cli.main import main; code = main(sys.argv[1:]); "
        "sys.exit(9 if {'torch', 'sentence_transformers'} & sys.modules.keys() else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *line.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: bad.") and "line " in done.stderr


def test_a_config_file_that_is_not_there(run: Callable[[str], tuple[int, str, str]]) -> None:
    code, _, errors = run("train --config none.yaml")
    assert_one_message(code, errors, "none.yaml: there is no such file")


@pytest.mark.parametrize("line", ["--help", "", "demo --help", "train --help", "evaluate --help", "export --help"])
def test_help_fits_a_screen(line: str, run: Callable[[str], tuple[int, str, str]]) -> None:
    code, out, errors = run(line)
    assert code == 0
    assert errors == ""
    assert 10 <= out.count("\n") <= 46
    assert max(map(len, out.splitlines())) <= 120


def test_version(run: Callable[[str], tuple[int, str, str]]) -> None:
    assert run("--version") == (0, f"embtune {embtune.__version__}\n", "")


def test_help_imports_no_verb() -> None:
    code = (
        "import sys; from embtune.cli.main import main; verbs = 'train', 'evaluate', 'export'; "
        "[main([verb, '--help']) for verb in verbs]; "
        "sys.exit(any(f'embtune.cli.{verb}' in sys.modules for verb in verbs))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_as_a_program_it_says_only_what_embtune_says(work_dir: Path, tiny_dir: Callable[..., Path]) -> None:
    # The texts of dev.jsonl twice: one warning of embtune's own, and none of anybody else's.
    model = str(tiny_dir("bert"))
    (work_dir / "both.jsonl").write_text((work_dir / "dev.jsonl").read_text() * 2)
    flags = "--data both.jsonl --batch-size 8 --max-steps 1 --warmup 0 --max-seq-length 512 --output run"
    command = [sys.executable, "-m", "embtune.cli.main", "train", "--model", model, *flags.split()]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    said = [line for line in finished.stderr.splitlines() if line.startswith("warning: ")]
    assert len(said) == 2
    assert "16 of 32 training rows repeat an earlier row" in said[0]
    assert "max_seq_length=512 is more than the 160 positions" in said[1]
    assert (work_dir / "run" / "merged" / "model.safetensors").exists()


def screen_state() -> tuple[Any, ...]:
    return (
        logging.root.manager.disable,
        list(warnings.filters),
        warnings.showwarning,
        transformers_logging.is_progress_bar_enabled(),
        datasets.are_progress_bars_disabled(),
        os.environ.get("TQDM_DISABLE"),
    )


def test_main_puts_the_screen_back_as_it_was(run: Callable[[str], tuple[int, str, str]]) -> None:
    before = screen_state()
    assert run("evaluate MODEL --data dev.jsonl")[0] == 0
    assert screen_state() == before
    assert run("evaluate nowhere --data dev.jsonl")[0] == 1
    assert screen_state() == before


def test_ctrl_c_ends_with_one_line(run: Callable[[str], tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    write = sys.stdout.write

    def interrupt(text: str) -> int:
        if "Measuring on" in text:
            signal.raise_signal(signal.SIGINT)
        return write(text)

    monkeypatch.setattr(sys.stdout, "write", interrupt)
    code, _, errors = run("evaluate MODEL --data dev.jsonl")
    assert code == 130
    assert errors == "\nStopped by Ctrl-C.\n"
