import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from embtune.cli.main import main

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"> & 'quoted' {{ 7 * 7 }}"
"""Would do harm in a page that does not escape it."""

VERBS = ["read", "sort", "count", "merge", "hash", "split"]
NOUNS = ["rows", "words", "files", "prices", "users", "colours", "trees", "queues"]


def write_pairs(folder: Path) -> None:
    """train.jsonl (32 pairs) and dev.jsonl (16 others, one of them hostile)."""
    pairs = [(f"how to {verb} {noun}", f"{verb} the {noun} of one customer") for verb in VERBS for noun in NOUNS]
    random.Random(0).shuffle(pairs)
    pairs[-1] = (f"how to {HOSTILE}", f"the answer {HOSTILE}")
    for name, part in (("train", pairs[:32]), ("dev", pairs[32:])):
        rows = (json.dumps({"anchor": anchor, "positive": positive}) for anchor, positive in part)
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Callable[..., Path]) -> Callable[..., Path]:
    """Run `embtune train` on those pairs with some more flags, and give the run's folder."""
    data = tmp_path_factory.mktemp("pairs")
    write_pairs(data)

    def run(name: str, *flags: str) -> Path:
        folder = tmp_path_factory.mktemp("runs") / name
        common = ["--model", str(tiny_dir("bert")), "--data", str(data / "train.jsonl"), "--output", str(folder)]
        flags = tuple(flag.replace("DEV", str(data / "dev.jsonl")) for flag in flags)
        assert main(["train", *common, "--batch-size", "8", *flags]) == 0
        return folder

    return run


@pytest.fixture(scope="session")
def whole_run(train: Callable[..., Path]) -> Path:
    """A run with everything: evaluations on the way, before and after, two exports."""
    return train(
        *("whole", "--eval-data", "DEV", "--max-steps", "12", "--eval-steps", "4", "--learning-rate", "3e-2"),
        "--no-forgetting-check",
        *("--exports", "merged", "gguf:q8_0"),
    )


@pytest.fixture(scope="session")
def plain_run(train: Callable[..., Path]) -> Path:
    """A run without evaluation or exports."""
    return train("plain", "--max-steps", "4", "--engine", "reference", "--exports", "merged")
