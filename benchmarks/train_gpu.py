"""One workload through embtune's own trainer on one NVIDIA GPU; prints a RESULT line with time, rate and memory.

    python benchmarks/train_gpu.py base 128 40 --data pairs.jsonl --tokenizer DIR

Models have random weights in real shapes, as have the peers' timings that a row is compared with; a row counts only
beside peers timed in the same session on the same machine.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import TrainerCallback

import embtune
from embtune.data.readers import read_dataset
from embtune.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss

VOCABULARY = 30522
BERT_SHAPES = {"minilm": (6, 384, 12, 1536), "base": (12, 768, 12, 3072), "large": (24, 1024, 16, 4096)}


def make_model(size: str, tokenizer_dir: str, length: int, folder: str) -> None:
    """Save random weights in a real shape as a sentence-transformers folder."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.model_max_length = length
    pooling = "mean"
    if size == "mpnet":
        config: Any = transformers.MPNetConfig(vocab_size=VOCABULARY, max_position_embeddings=length + 2)
    elif size == "modernbert":
        special = {"bos_token_id": 101, "eos_token_id": 102, "cls_token_id": 101, "sep_token_id": 102}
        config = transformers.ModernBertConfig(vocab_size=VOCABULARY, pad_token_id=0, **special)
    elif size == "qwen3":
        shape = {"num_hidden_layers": 28, "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8}
        config = transformers.Qwen3Config(**shape, head_dim=128, intermediate_size=3072, vocab_size=VOCABULARY)
        pooling = "lasttoken"
    else:
        layers, hidden, heads, inner = BERT_SHAPES[size]
        config = transformers.BertConfig(
            num_hidden_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            intermediate_size=inner,
            vocab_size=VOCABULARY,
            max_position_embeddings=length,
        )
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    modules = [
        Transformer(folder, max_seq_length=length),
        Pooling(config.hidden_size, pooling_mode=pooling),
        Normalize(),
    ]
    SentenceTransformer(modules=modules).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=[*BERT_SHAPES, "mpnet", "modernbert", "qwen3"])
    parser.add_argument("batch", type=int)
    parser.add_argument("steps", type=int)
    parser.add_argument("--data", required=True, help="JSONL with anchor and positive")
    parser.add_argument("--tokenizer", required=True, help="folder of a WordPiece tokenizer")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--full", action="store_true", help="train all weights instead of LoRA")
    parser.add_argument("--cached", type=int, default=0, help="the cached loss with mini-batches of this size")
    options = parser.parse_args()

    stamps: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            stamps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        make_model(options.size, options.tokenizer, options.length, folder)
        model = embtune.FastSentenceTransformer.from_pretrained(
            folder, max_seq_length=options.length, engine=options.engine, full_finetuning=options.full
        )
        if not options.full:
            model = embtune.FastSentenceTransformer.get_peft_model(model, r=options.r, lora_alpha=2 * options.r)
        rows = read_dataset(options.data, columns={"anchor": "anchor", "positive": "positive"}).shuffle(seed=0)
        count = min(options.batch * options.steps, 60_000)
        data = Dataset.from_dict(rows[[index % len(rows) for index in range(count)]])
        loss: Any = MultipleNegativesRankingLoss(model)
        if options.cached:
            loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=options.cached)
        args = embtune.SentenceTransformerTrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=2e-5,
            bf16=True,
            tf32=True,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            seed=42,
            optim="adamw_torch_fused",
            disable_tqdm=True,
        )
        trainer = embtune.SentenceTransformerTrainer(
            model=model, args=args, train_dataset=data, loss=loss, callbacks=[Clock()]
        )
        torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        trainer.train()
    steps = [late - early for early, late in itertools.pairwise(stamps)]
    second_half = steps[len(steps) // 2 :]
    row = {
        "peer": f"embtune-{model.engine.name}",
        "size": options.size,
        "full": options.full,
        "batch": options.batch,
        "data": Path(options.data).name,
        "cached": options.cached,
        "median_ms": round(1e3 * statistics.median(second_half), 2),
        "mean_ms": round(1e3 * statistics.mean(second_half), 2),
        "pairs_per_s": round(options.batch / statistics.mean(second_half), 1),
        "first_step_s": round(stamps[0] - begun, 1),
        "total_s": round(stamps[-1] - begun, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }
    print("RESULT " + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
