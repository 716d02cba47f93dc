import io
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from sentence_transformers import SentenceTransformer
from transformers import TrainerControl, TrainerState, TrainingArguments

from embtune.cli.config import DemoConfig
from embtune.cli.demo import run_demo
from embtune.cli.display import duration
from embtune.cli.pacing import WARMUP_STEPS, TimeBudget
from embtune.cli.progress import TrainingProgress
from embtune.errors import ArgumentError, DataError
from embtune.files import read_json

# PEFT asks transformers for a name it gave up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

VERBS = ["read", "sort", "count", "merge", "hash", "split"]
NOUNS = ["rows", "words", "files", "prices", "users", "colours", "trees", "queues"]


@pytest.fixture(scope="module")
def code_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight modules of six functions, one for each noun and verb."""
    folder = tmp_path_factory.mktemp("code")
    for noun in NOUNS:
        functions = [
            f"def {verb}_{noun}(all_{noun}, by_{verb}=None):\n"
            f'    """{verb.capitalize()} the {noun} of one customer."""\n'
            f"    {verb}_result = [{noun}_item.{verb}(by_{verb}) for {noun}_item in all_{noun}]\n"
            f"    return {verb}_result\n"
            for verb in VERBS
        ]
        (folder / f"{noun}.py").write_text("\n\n".join(functions), encoding="utf-8")
    return folder


def log_console(stream: io.StringIO) -> Console:
    return Console(file=stream, markup=False, highlight=False, width=120)


def test_the_whole_demo_on_own_code(code_dir: Path, tmp_path: Path, tiny_dir: Callable[..., Path]) -> None:
    out = tmp_path / "out"
    stream = io.StringIO()
    config = DemoConfig(
        path=code_dir, model=str(tiny_dir("bert")), out=out, steps=3, batch_size=8, held_out=10, engine="reference"
    )
    assert run_demo(config, log_console(stream)) == 0
    shown = stream.getvalue()

    assert "step 1/3  loss" in shown
    assert "step 3/3  loss" in shown
    assert "tokens/s" in shown
    for metric in ("ndcg@10", "mrr@10", "recall@10"):
        assert shown.count(metric) >= 2
    assert "prose did not get worse" in shown or "Prose got worse" in shown
    assert sum(line.startswith("1  ") for line in shown.splitlines()) == 5

    results = read_json(out / "results.json")
    assert results["training"]["steps"] == 3
    assert results["data"]["modules"] == 8
    assert results["settings"]["seed"] == 0
    assert results["reload_min_cosine"] > 0.999
    for data in ("code", "general"):
        metric = results[data]["metrics"]["ndcg@10"]
        assert 0 <= metric["before"] <= 1
        assert metric["low"] <= metric["difference"] <= metric["high"]

    card = (out / "merged" / "README.md").read_text(encoding="utf-8")
    change = results["code"]["metrics"]["ndcg@10"]
    assert f"{change['after']:.4f} (before: {change['before']:.4f}" in card
    assert "lora_r" in card and "docstrings" in card

    [gguf] = (Path(name) for name in results["gguf"])
    assert gguf.read_bytes()[:4] == b"GGUF"
    assert f"-m {gguf}" in shown
    assert str(out / "merged") in shown
    assert sorted(entry.name for entry in out.iterdir()) == sorted(
        ["events.jsonl", "gguf", "merged", "report.html", "results.json"]
    )
    vectors = SentenceTransformer(str(out / "merged"), device="cpu").encode(["sort the rows", "hash the trees"])
    assert vectors.shape == (2, 32)


def test_ctrl_c_in_training_ends_with_one_line_and_leaves_nothing(
    code_dir: Path, tmp_path: Path, tiny_dir: Callable[..., Path]
) -> None:
    class InterruptedStream(io.StringIO):
        interrupted = False

        def write(self, text: str) -> int:
            if "step 1/" in text and not self.interrupted:
                self.interrupted = True
                signal.raise_signal(signal.SIGINT)
            return super().write(text)

    stream = InterruptedStream()
    out = tmp_path / "out"
    config = DemoConfig(path=code_dir, model=str(tiny_dir("bert")), out=out, steps=50, batch_size=8, held_out=10)
    assert run_demo(config, log_console(stream)) == 130
    # The line ends with the folder's name, which may be too long for one.
    assert any(line.startswith("Stopped by Ctrl-C.") for line in stream.getvalue().splitlines()[-3:])
    assert not out.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"minutes": 0.0}, "--minutes"),
        ({"minutes": float("nan")}, "--minutes"),
        ({"steps": 0}, "--steps"),
        ({"batch_size": 1}, "--batch-size"),
        ({"learning_rate": -1.0}, "--learning-rate"),
        ({"out": Path(__file__)}, "--out"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        DemoConfig(**settings)


def test_a_folder_without_functions_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    config = DemoConfig(path=tmp_path / "code", model="unused", out=tmp_path / "out")
    with pytest.raises(DataError, match="0 usable functions"):
        run_demo(config, log_console(io.StringIO()))
    assert not (tmp_path / "out").exists()


def step(budget: TimeBudget, state: TrainerState, control: TrainerControl, args: TrainingArguments) -> None:
    state.global_step += 1
    budget.on_step_end(args, state, control)


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")


def test_time_budget_ends_on_time_with_a_falling_learning_rate(args: TrainingArguments) -> None:
    state, control = TrainerState(), TrainerControl()
    start = time.perf_counter()
    budget = TimeBudget(1.0, at_most=10_000)
    budget.on_train_begin(args, state, control)
    factors = []
    while not control.should_training_stop:
        factors.append(budget.learning_rate_factor(state.global_step))
        time.sleep(0.05)
        step(budget, state, control, args)
    elapsed = time.perf_counter() - start
    assert elapsed < 1.3
    assert 0.05 <= budget.seconds_per_step < 0.2
    assert 5 <= state.global_step <= 20
    assert state.global_step == budget.total
    assert factors[0] == pytest.approx(1 / WARMUP_STEPS)
    assert max(factors[3:]) < 1
    assert factors[-1] < 0.35


def test_time_budget_without_time_takes_one_step_and_with_steps_ignores_time(args: TrainingArguments) -> None:
    for budget, steps in ((TimeBudget(-5.0, at_most=9), 1), (TimeBudget(None, at_most=4), 4), (TimeBudget(60, 4), 4)):
        state, control = TrainerState(), TrainerControl()
        budget.on_train_begin(args, state, control)
        while not control.should_training_stop:
            step(budget, state, control, args)
        assert state.global_step == steps


def test_scheduler_reaches_the_optimizer() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=3.0)
    scheduler = TimeBudget(None, at_most=6).scheduler(optimizer)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1, 2 * 5 / 6, 3 * 4 / 6, 3 * 3 / 6, 3 * 2 / 6, 3 * 1 / 6])


def test_progress_moves_a_bar_on_a_terminal(args: TrainingArguments) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, markup=False)
    state, control = TrainerState(), TrainerControl()
    budget = TimeBudget(None, at_most=2)
    budget.on_train_begin(args, state, control)
    with TrainingProgress(console, budget, tokens_per_step=1000) as progress:
        for loss in (2.0, 1.5):
            step(budget, state, control, args)
            progress.on_step_end(args, state, control)
            progress.on_log(args, state, control, logs={"loss": loss})
        progress.on_log(args, state, control, logs={"train_runtime": 1.0})
    assert progress.losses == [2.0, 1.5]
    assert "loss 1.500" in stream.getvalue()
    assert "2/2" in stream.getvalue()
    assert "tokens/s" in stream.getvalue()


def test_duration() -> None:
    assert duration(8.24) == "8.2 s"
    assert duration(245) == "4 min 05 s"
