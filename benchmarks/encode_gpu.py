"""What `encode` takes on a GPU: sentence-transformers padded, the same unpadded on FlashAttention-2, and embtune.

    python benchmarks/encode_gpu.py --data PAIRS.jsonl --tokenizer FOLDER --out benchmarks/results/encode_gpu.jsonl

BERT-base's shape with random weights, in bfloat16. Each is timed in a process of its own, end to end with tokenising.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from train_gpu import make_model

import embtune
from embtune.data.readers import read_dataset
from embtune.runtime import describe_machine

ENCODERS = ("st", "st-fa2", "embtune")


def load(encoder: str, folder: str) -> SentenceTransformer:
    """The model as its users would load it."""
    if encoder == "embtune":
        return embtune.FastSentenceTransformer.from_pretrained(folder, max_seq_length=512, dtype="bfloat16")
    attention = {"attn_implementation": "flash_attention_2"} if encoder == "st-fa2" else {}
    return SentenceTransformer(folder, device="cuda", model_kwargs={"dtype": torch.bfloat16, **attention})


def measure(options: argparse.Namespace) -> None:
    """Encode the texts by one encoder and print a RESULT line."""
    rows = read_dataset(options.data, columns={"anchor": "anchor", "positive": "positive"}).shuffle(seed=0)
    texts = [*rows["anchor"], *rows["positive"]][: options.texts]
    model = load(options.encoder, options.model)
    model.encode(texts[: 4 * options.batch], batch_size=options.batch)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    model.encode(texts, batch_size=options.batch)
    seconds = time.perf_counter() - begun
    result = {
        "encoder": options.encoder,
        "texts": len(texts),
        "batch": options.batch,
        "seconds": round(seconds, 2),
        "texts_per_s": round(len(texts) / seconds),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }
    print("RESULT", json.dumps(result), flush=True)


def table(options: argparse.Namespace) -> None:
    """Every encoder in a process of its own; adds rows to the file."""
    done: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        make_model("base", options.tokenizer, 512, folder)
        for encoder in ENCODERS:
            given = ["--data", options.data, "--texts", str(options.texts), "--batch", str(options.batch)]
            command = [sys.executable, __file__, *given, "--encoder", encoder, "--model", folder]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            line = next((line for line in run.stdout.splitlines() if line.startswith("RESULT")), None)
            if line is None:
                print(f"{encoder}: no result\n{run.stderr[-2000:]}", flush=True)
                continue
            done.append(json.loads(line.removeprefix("RESULT")))
            print(done[-1], flush=True)
    facts = {"date": datetime.date.today().isoformat(), "benchmark": "encode_gpu", "data": Path(options.data).stem}
    machine = describe_machine(torch.device("cuda"))
    with Path(options.out).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**facts, **result, "machine": machine}) + "\n" for result in done)


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="JSONL with anchor and positive")
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--tokenizer", help="folder of a WordPiece tokenizer")
    parser.add_argument("--out", help="JSONL file to add rows to")
    parser.add_argument("--encoder", choices=ENCODERS, help="only this one, in this process; prints a RESULT line")
    parser.add_argument("--model", help="its folder")
    options = parser.parse_args()
    (table if options.encoder is None else measure)(options)


if __name__ == "__main__":
    main()
