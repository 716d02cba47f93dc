from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset

from embtune import FastSentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from embtune.losses import MultipleNegativesRankingLoss  # type: ignore[attr-defined]
from embtune.report import callback
from embtune.report.callback import EventCallback, StepTimer
from embtune.report.events import EventLog, read_events

# torch's loader speaks of pinned memory without an accelerator.
pytestmark = pytest.mark.filterwarnings(
    "ignore:'pin_memory' argument is set as true:UserWarning", "ignore:gradient_accumulation_steps"
)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_real_run_is_written_down(
    tmp_path: Path, tiny_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    monkeypatch.setattr(callback, "HEARTBEAT", 0.0)
    model = FastSentenceTransformer.from_pretrained(str(tiny_dir("bert")))
    model = FastSentenceTransformer.get_peft_model(model, r=4)
    loss = MultipleNegativesRankingLoss(model)
    log = EventLog(tmp_path)
    timer = StepTimer(log, [loss], warm_up=1, steps=2)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            str(tmp_path / "checkpoints"),
            max_steps=4,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=accumulation,
            logging_steps=2,
            save_steps=4,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(
            {"anchor": [f"question {n}" for n in range(32)], "positive": [f"answer {n}" for n in range(32)]}
        ),
        loss=loss,
        callbacks=[EventCallback(log, tokens_per_step=100.0), timer],
    )
    trainer.train()
    events, damaged = read_events(log.path)
    assert damaged == 0
    names = [event["event"] for event in events]
    assert names == ["training", "step", "step", "log", "step", "step_time", "step", "log", "checkpoint", "trained"]
    logs = [event for event in events if event["event"] == "log"]
    assert [event["step"] for event in logs] == [2, 4]
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [event["loss"] for event in logs] == history
    assert all(event["tokens_per_second"] > 0 and event["learning_rate"] > 0 for event in logs)
    assert logs[0]["memory"] > 50 * 2**20
    measured = next(event for event in events if event["event"] == "step_time")
    assert measured["steps"] == 2
    assert list(measured["seconds"]) == ["data", "forward", "backward", "optimizer"]
    between = events[names.index("step_time")]["time"] - events[1]["time"]
    assert 0 < sum(measured["seconds"].values()) <= between / 2 * 1.05
    assert min(measured["seconds"].values()) > 0
    assert not loss._forward_hooks


def test_a_run_that_is_too_short_to_measure_leaves_no_hook(tmp_path: Path) -> None:
    timer = StepTimer(EventLog(tmp_path), [])
    timer.on_train_end()
    assert not list(tmp_path.iterdir())
