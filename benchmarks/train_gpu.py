"""Training steps on one NVIDIA GPU: embtune beside sentence-transformers, each through its own trainer.

    python benchmarks/train_gpu.py table --data FOLDER --tokenizer FOLDER --out benchmarks/results/train_gpu.jsonl
    python benchmarks/train_gpu.py one base 128 --data FOLDER/medquad.jsonl --tokenizer FOLDER --kernels 30

`table` runs every line of `LINES` by one trainer after the other, each in a process of its own (once a profiler has
run, launches may be slower), and prints the ratios; FOLDER holds JSONL files with anchor and positive, named as in
`LINES`. Models have random weights in real shapes.

`st` is sentence-transformers padded, in bfloat16 autocast; `st-fa2` the same on a bfloat16 base with FlashAttention-2
and without padding, which needs the package flash-attn or anything that offers its functions.
"""

import argparse
import cProfile
import itertools
import json
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, TaskType
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import TrainerCallback

import embtune
from embtune.data.readers import read_dataset
from embtune.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss
from embtune.models.families import encoder_layers, family_of
from embtune.runtime import describe_machine

TRAINERS = ("embtune", "st-fa2", "st")
VOCABULARY = 30522
BERT_SHAPES = {"minilm": (6, 384, 12, 1536), "base": (12, 768, 12, 3072), "large": (24, 1024, 16, 4096)}
PROFILED_STEPS = 6

LINES: tuple[tuple[str, int, str, str, str], ...] = (
    ("base", 128, "medquad", "--r 16", "st-fa2"),
    ("base", 128, "nl2bash", "--r 16", "st-fa2"),
    ("large", 8, "synthetic", "--r 8", "st-fa2"),
    ("qwen3", 32, "medquad", "--r 32", "st-fa2"),
    ("mpnet", 128, "medquad", "--r 16", "st"),
    ("modernbert", 64, "scifact", "--r 16 --length 1024", "st-fa2"),
    ("minilm", 256, "nl2bash", "--full", "st-fa2"),
)
"""Model, pairs a batch, data, the rest, and the fastest peer: transformers has no FlashAttention for MPNet."""


class Clock(TrainerCallback):
    """Marks the end of each step on the device without waiting for it, and profiles the steps after the timed ones."""

    def __init__(self, timed_steps: int, profile_host: bool) -> None:
        self.timed_steps = timed_steps
        self.begun = time.perf_counter()
        self.first_step_s = 0.0
        self.total_s = 0.0
        self.ends: list[torch.cuda.Event] = []
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.host = cProfile.Profile() if profile_host else None

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record the end of a step."""
        if state.global_step == 1:
            torch.cuda.synchronize()
            self.first_step_s = time.perf_counter() - self.begun
        if state.global_step <= self.timed_steps:
            self.ends.append(torch.cuda.Event(enable_timing=True))
            self.ends[-1].record()
        if state.global_step == self.timed_steps:
            torch.cuda.synchronize()
            self.total_s = time.perf_counter() - self.begun
            self.host.enable() if self.host is not None else self.profile.start()
        if state.global_step == self.timed_steps + PROFILED_STEPS:
            control.should_training_stop = True
            torch.cuda.synchronize()
            self.host.disable() if self.host is not None else self.profile.stop()

    def steps_ms(self) -> list[float]:
        """The second half of the timed steps."""
        steps = [early.elapsed_time(late) for early, late in itertools.pairwise(self.ends)]
        return steps[len(steps) // 2 :]

    def kernels(self) -> dict[str, tuple[float, float]]:
        """Name -> launches and milliseconds, of one profiled step."""
        found: dict[str, tuple[float, float]] = {}
        for event in self.profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                launches, ms = found.get(event.name, (0, 0.0))
                found[event.name] = launches + 1, ms + event.device_time / 1e3
        return {name: (n / PROFILED_STEPS, ms / PROFILED_STEPS) for name, (n, ms) in found.items()}


def make_model(size: str, tokenizer_dir: str, length: int, folder: str) -> None:
    """Save random weights in a real shape as a sentence-transformers folder, unless it is there already."""
    if Path(folder, "modules.json").exists():
        return
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


def load(trainer: str, folder: str, options: argparse.Namespace) -> SentenceTransformer:
    """The model, with adapters unless all weights are trained."""
    if trainer == "embtune":
        model = embtune.FastSentenceTransformer.from_pretrained(
            folder,
            max_seq_length=options.length,
            engine=options.engine,
            full_finetuning=options.full,
            use_gradient_checkpointing=options.checkpointing,
        )
        if not options.full:
            model = embtune.FastSentenceTransformer.get_peft_model(model, r=options.r, lora_alpha=2 * options.r)
        return model
    unpadded = {"attn_implementation": "flash_attention_2", "dtype": torch.bfloat16}
    model = SentenceTransformer(folder, device="cuda", model_kwargs=unpadded if trainer == "st-fa2" else {})
    if not options.full:
        targets = list(family_of(model[0].model.config).lora_targets)
        kind = TaskType.FEATURE_EXTRACTION
        model.add_adapter(LoraConfig(r=options.r, lora_alpha=2 * options.r, target_modules=targets, task_type=kind))
    if trainer == "st-fa2":
        assert model[0].can_flatten_inputs, "sentence-transformers pads all the same"
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


def read_pairs(path: str, count: int) -> Dataset:
    """So many pairs, shuffled; small files are gone through several times."""
    rows = read_dataset(path, columns={"anchor": "anchor", "positive": "positive"}).shuffle(seed=0)
    return Dataset.from_dict(rows[[index % len(rows) for index in range(count)]])


def arguments(folder: str, batch: int, steps: int, planned: int) -> dict[str, Any]:
    """What every trainer is told; `planned` steps, of which the clock lets `steps` happen."""
    return {
        "output_dir": folder,
        "max_steps": max(steps, planned),
        "per_device_train_batch_size": batch,
        "learning_rate": 2e-5,
        "bf16": True,
        "tf32": True,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 42,
        "optim": "adamw_torch_fused",
        "disable_tqdm": True,
    }


def measure(options: argparse.Namespace) -> None:
    """Train a model by one trainer and print a RESULT line."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(options.size, options.tokenizer, options.length, options.model or folder)
        measure_in(folder, options)


def measure_in(folder: str, options: argparse.Namespace) -> None:
    """Train the model that was saved for it."""
    name, steps = options.trainer, options.steps
    clock = Clock(steps - PROFILED_STEPS, profile_host=bool(options.host))
    model = load(name, options.model or folder, options)
    data = read_pairs(options.data, min(options.batch * steps, 60_000))
    loss: Any = MultipleNegativesRankingLoss(model)
    if options.cached:
        loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=options.cached)
    settings: dict[str, Any] = {"model": model, "train_dataset": data, "loss": loss, "callbacks": [clock]}
    told = arguments(folder, options.batch, steps, options.planned)
    if name == "embtune":
        own = {"compile": options.compile, "cuda_graphs": options.cuda_graphs, "fused_kernels": options.fused_kernels}
        args = embtune.SentenceTransformerTrainingArguments(**told, **own)
        trainer: Any = embtune.SentenceTransformerTrainer(args=args, **settings)
    else:
        args = SentenceTransformerTrainingArguments(**told)
        trainer = SentenceTransformerTrainer(args=args, **settings)
    torch.cuda.reset_peak_memory_stats()
    clock.begun = time.perf_counter()
    trainer.train()
    if clock.host is not None:
        for order in ("tottime", "cumtime"):
            pstats.Stats(clock.host).sort_stats(order).print_stats(options.host)
        return
    kernels = clock.kernels()
    for kernel, (launches, ms) in sorted(kernels.items(), key=lambda item: -item[1][1])[: options.kernels]:
        print(f"{ms:8.3f} ms {launches:7.1f} x {kernel[:110]}")
    print("RESULT " + json.dumps(row_of(name, options, model, data, clock, kernels)), flush=True)


def row_of(
    trainer: str,
    options: argparse.Namespace,
    model: SentenceTransformer,
    data: Dataset,
    clock: Clock,
    kernels: Mapping[str, tuple[float, float]],
) -> dict[str, Any]:
    """What is kept of a measurement."""
    steps = clock.steps_ms()
    median, kernel_ms = statistics.median(steps), sum(ms for _, ms in kernels.values())
    texts = [text for column in data[: 8 * options.batch].values() for text in column]
    ids = model.tokenizer(texts, truncation=True, max_length=options.length)["input_ids"]
    tokens = sum(map(len, ids)) / len(texts) * 2 * options.batch
    backbone = model[0].model
    matrices = [
        parameter.numel()
        for layer in encoder_layers(backbone)
        for name, parameter in layer.named_parameters()
        if parameter.ndim == 2 and "lora_" not in name
    ]
    # Forward, and backward for activations; with all weights trained, for them as well.
    tera = (6 if options.full else 4) * sum(matrices) * tokens / 1e12
    return {
        "trainer": trainer,
        "size": options.size,
        "full": options.full,
        "batch": options.batch,
        "data": Path(options.data).stem,
        "cached": options.cached,
        "checkpointing": options.checkpointing,
        "median_ms": round(median, 2),
        "mean_ms": round(statistics.mean(steps), 2),
        "pairs_per_s": round(1e3 * options.batch / median, 1),
        "tokens_per_s": round(1e3 * tokens / median),
        "useful_tflops": round(1e3 * tera / median, 1),
        "kernel_ms": round(kernel_ms, 2),
        "kernels": round(sum(launches for launches, _ in kernels.values())),
        "busy": round(kernel_ms / median, 3),
        "first_step_s": round(clock.first_step_s, 1),
        "steps_timed": clock.timed_steps,
        "total_s": round(clock.total_s, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def matrix_rate() -> float:
    """TFLOP/s of a large bfloat16 product on this GPU now."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(10):
        left @ right
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(30):
        left @ right
    end.record()
    torch.cuda.synchronize()
    return 30 * 2 * 8192**3 / begin.elapsed_time(end) / 1e9


def table(options: argparse.Namespace) -> None:
    """All lines; rows are written as they come."""
    machine, rate = describe_machine(), round(matrix_rate(), 1)
    torch.cuda.empty_cache()
    print(f"{machine['device']}: {rate} TFLOP/s in a large bfloat16 product", flush=True)
    for size, batch, data, others, fastest_peer in LINES:
        if options.only and f"{size}:{data}" not in options.only:
            continue
        trainers = ["embtune", fastest_peer, *(["st"] if options.all_peers and fastest_peer != "st" else [])]
        ours: float | None = None
        with tempfile.TemporaryDirectory() as folder:
            for trainer in trainers:
                steps = options.steps if trainer == "embtune" else options.peer_steps
                line = [size, str(batch), *others.split(), "--trainer", trainer, "--steps", str(steps)]
                where = ["--data", f"{options.data}/{data}.jsonl", "--tokenizer", options.tokenizer, "--model", folder]
                command = [sys.executable, __file__, "one", *line, *where]
                run = subprocess.run(command, capture_output=True, text=True, check=False)
                results = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
                if not results:
                    print(f"{trainer} {size} {data} failed: {run.stderr[-600:]}", flush=True)
                    continue
                row = json.loads(results[0].removeprefix("RESULT "))
                row["matrix_share"] = round(row["useful_tflops"] / rate, 3)
                ours = row["median_ms"] if trainer == "embtune" else ours
                if ours is not None:
                    row["times_slower_than_embtune"] = round(row["median_ms"] / ours, 2)
                print(json.dumps(row), flush=True)
                whole = {"date": date.today().isoformat(), "benchmark": "train_gpu", **row, "matrix_tflops": rate}
                with Path(options.out).open("a") as file:
                    file.write(json.dumps({**whole, "machine": machine}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("one", help="one workload")
    one.set_defaults(run=measure)
    one.add_argument("size", choices=[*BERT_SHAPES, "mpnet", "modernbert", "qwen3"])
    one.add_argument("batch", type=int)
    one.add_argument("--trainer", choices=TRAINERS, default="embtune")
    one.add_argument(
        "--planned", type=int, default=1000, help="steps that the trainer is told of, and stopped long before"
    )
    one.add_argument("--model", help="folder where the model is, or is put for the next trainer")
    one.add_argument("--engine", default="auto")
    one.add_argument("--r", type=int, default=16)
    one.add_argument("--length", type=int, default=512)
    one.add_argument("--full", action="store_true", help="train all weights instead of LoRA")
    one.add_argument("--cuda-graphs", default="auto", help="as in the training arguments")
    one.add_argument("--compile", default="auto", help="as in the training arguments")
    kinds = {"none": None, "whole": True, "selective": "selective"}
    one.add_argument("--checkpointing", type=kinds.get, help=f"of embtune: {', '.join(kinds)}")
    one.add_argument("--fused-kernels", default="auto", help="as in the training arguments")
    one.add_argument("--cached", type=int, default=0, help="the cached loss with mini-batches of this size")
    one.add_argument("--kernels", type=int, default=0, help="print the kernels that took longest, so many of them")
    one.add_argument("--host", type=int, default=0, help="print the Python functions that took longest instead")
    several = verbs.add_parser("table", help="every line by every trainer")
    several.set_defaults(run=table)
    several.add_argument("--peer-steps", type=int, default=36, help="of the others")
    several.add_argument("--all-peers", action="store_true", help="padded sentence-transformers on every line")
    several.add_argument("--only", nargs="+", help="of the lines, such as base:medquad")
    several.add_argument("--out", required=True, help="JSONL file to add rows to")
    for each in (one, several):
        each.add_argument("--steps", type=int, default=66, help="of `table`: of embtune; the profiled ones included")
        each.add_argument("--data", required=True, help="JSONL with anchor and positive; of `table`, their folder")
        each.add_argument("--tokenizer", required=True, help="folder of a WordPiece tokenizer")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
