"""What a run measures while it trains, on labelled texts: classes found by a probe, and clusters."""

from collections.abc import Callable
from pathlib import Path

import pytest

from embtune import FastSentenceTransformer
from embtune.cli.main import main
from embtune.cli.tasks import EvaluationTask
from embtune.files import read_json
from embtune.report.run import read_run

THEMES = ("read the rows", "sort the words", "hash a tree", "count users")


@pytest.fixture
def config(work_dir: Path, tiny_dir: Callable[..., Path]) -> Path:
    """A config, in a folder of its own, of a run that gets worse from step to step."""
    folder = work_dir / "config"
    folder.mkdir()
    for name, words in (("topics", "please"), ("probe", "now")):
        rows = (f"{words} {THEMES[n % 4]} {n},{n % 4}" for n in range(24))
        (folder / f"{name}.csv").write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    (folder / "run.yaml").write_text(
        f"model: {tiny_dir('bert')}\n"
        "data: ../train.jsonl\n"
        "eval_data: {topics: topics.csv, groups: topics.csv}\n"
        "eval_tasks: {topics: classification, groups: clustering}\n"
        "eval_train_data: {topics: probe.csv}\n"
        "eval_steps: 1\n"
        "early_stopping_patience: 2\n"
        "forgetting_check: false\n"
        "batch_size: 8\n"
        "max_steps: 12\n"
        "learning_rate: 0.5\n"
        "warmup: 0\n"
        "dtype: float32\n"
        "output: ../run\n",
        encoding="utf-8",
    )
    return folder / "run.yaml"


def test_the_best_model_is_known_by_its_classes(
    config: Path, work_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config)]) == 0
    shown = capsys.readouterr().out
    assert "classification of 24 texts (text) in 4 classes (label) from topics.csv, with a probe trained on 24" in shown
    evaluations = dict(read_run(work_dir / "run").evaluations)
    assert {"topics_accuracy", "topics_macro_f1", "groups_v_measure"} <= evaluations[1].keys()
    scores = [metrics["topics_accuracy"] for metrics in evaluations.values()]
    assert len(scores) < 12  # two evaluations without gain stopped it
    assert scores[-1] < max(scores)
    results = read_json(work_dir / "run" / "results.json")["evaluations"]
    assert results["topics"]["metrics"]["accuracy"]["after"] == pytest.approx(max(scores))
    # What was saved is that model.
    merged = FastSentenceTransformer.from_pretrained("run/merged", dtype="float32", for_inference=True)
    topics, probe = (str(config.parent / f"{name}.csv") for name in ("topics", "probe"))
    task = EvaluationTask.read(topics, {}, task="classification", train_data=probe)
    assert task.run(merged).metrics["accuracy"] == pytest.approx(max(scores), abs=0.05)
