"""What a run will take, estimated before its first step."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from embtune.accelerate.breakeven import CompileEstimate
from embtune.losses.services import Service, service_of
from embtune.models.checkpointing import is_selective, recomputes_layers
from embtune.models.families import encoder_layers, unwrapped
from embtune.models.modules import transformer_modules
from embtune.train.compiling import compile_settings, steps_of_run
from embtune.train.trainer import SentenceTransformerTrainer

# Numbers that a layer keeps for its backward pass, per token and hidden unit. From benchmarks/results: BERT-base with
# LoRA on one H200, 8.6 GiB at 128 × 210 tokens (train_gpu.jsonl); MiniLM on a CPU, 3.3 GiB at a batch of 64
# (train_cpu.jsonl), where attention keeps its scores.
_KEPT = {"cuda": 18, "cpu": 44}
_KEPT_CHECKPOINTED = 1
# BERT: input, query, key, value, attention, its projection, four of the wide product, and the narrow one.
_KEPT_SELECTIVE = 11
# What a step takes on a CPU: fitted to 39 kinds of run on one thread of an AMD EPYC (MiniLM and layers of BERT-base,
# texts of 14 to 240 tokens, both engines, LoRA and full); benchmarks/results/step_estimate.jsonl compares it with runs.
# Only the products shrink with the square of the width; on MiniLM they are half of a step or less.
_PRODUCTS = {torch.float32: 95e9, torch.bfloat16: 420e9}  # operations a second
_ATTENTION = 0.39e-9  # seconds for each layer, hidden unit, token, and token that it reads
_OTHERS = 82e-9  # for each layer, hidden unit and token: norms, activations, dropout, adapters, casts
_STEP = 0.05  # for each step: launching, loss, optimizer
_PROBE = 512, 384  # tokens and width of the product that tells how fast this machine is
_ADAM = 8  # bytes: two moments in float32
_PROCESS = 0.8e9  # bytes of Python and the libraries, which count where the memory is the machine's


@dataclass(frozen=True)
class RunEstimate:
    """Time and memory of a run."""

    steps: int
    """Optimizer steps."""
    step_seconds: float | None
    """Of a step; None where nothing like this device was measured."""
    memory: int
    """Most bytes at once: on the accelerator, or on a CPU of the whole process."""
    measured: bool = False
    """Whether real steps were timed here; else both follow from the size of model and batch."""

    @property
    def seconds(self) -> float | None:
        """Of all steps."""
        return None if self.step_seconds is None else self.steps * self.step_seconds

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "step_seconds": self.step_seconds,
            "memory": self.memory,
            "measured": self.measured,
        }


def estimate_run(
    trainer: SentenceTransformerTrainer, tokens_per_step: float, tokens_read: float, speed: float | None = None
) -> RunEstimate:
    """Estimate from the sizes of model and batch, and on a CPU from how fast it multiplies.

    Args:
        tokens_per_step: what the encoder computes in a step, padding included where it pads.
        tokens_read: how many tokens each of these reads in attention, on average.
        speed: of this machine, as `cpu_speed` measures it; None measures it now.
    """
    seconds = _step_seconds(trainer, tokens_per_step, tokens_read, speed)
    return RunEstimate(steps_of_run(trainer), seconds, round(_memory(trainer, tokens_per_step)))


def cpu_speed(clock: Callable[[], float] = time.perf_counter) -> float:
    """How many times as fast this machine multiplies, all threads together, as the one whose steps were measured.

    Args:
        clock: seconds; those of `time.process_time` leave out what others do with the processor.
    """
    tokens, width = _PROBE
    states, weight = torch.ones(tokens, width), torch.ones(4 * width, width)
    seconds = []
    for _ in range(6):
        start = clock()
        torch.nn.functional.linear(states, weight)
        seconds.append(clock() - start)
    operations = 2 * tokens * width * 4 * width
    return operations / statistics.median(seconds[1:]) / _PRODUCTS[torch.float32]


def _step_seconds(
    trainer: SentenceTransformerTrainer, tokens: float, tokens_read: float, speed: float | None
) -> float | None:
    device = trainer.model.device.type
    if device not in ("cpu", "cuda"):
        return None
    settings = CompileEstimate(**compile_settings(trainer) | {"tokens_per_step": max(1, round(tokens))})
    if device == "cuda":
        return settings.uncompiled_seconds
    return _cpu_seconds(trainer, settings, tokens_read) / (speed or cpu_speed()) + _STEP


def _cpu_seconds(trainer: SentenceTransformerTrainer, settings: CompileEstimate, tokens_read: float) -> float:
    passes = 2 + (settings.trainable == "full") + settings.checkpointing
    operations = 2 * passes * settings.parameters * settings.tokens_per_step
    products = operations / _PRODUCTS.get(settings.dtype, _PRODUCTS[torch.float32])
    hidden = max(unwrapped(part.model).config.hidden_size for part in transformer_modules(trainer.model))
    units = settings.layers * hidden * settings.tokens_per_step * (1 + settings.checkpointing / 2)
    return products + units * (_OTHERS + _ATTENTION * tokens_read)


def _memory(trainer: SentenceTransformerTrainer, tokens_per_step: float) -> float:
    model = trainer.model
    tensors = [*model.parameters(), *model.buffers()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    trained = sum(each.numel() * (each.element_size() + _ADAM) for each in model.parameters() if each.requires_grad)
    tokens = tokens_per_step / max(1, trainer.args.gradient_accumulation_steps) * _share_at_once(trainer)
    kept = sum(_activations(part.model, tokens) for part in transformer_modules(model))
    return weights + trained + kept + (_PROCESS if model.device.type == "cpu" else 0)


def _activations(backbone: torch.nn.Module, tokens: float) -> float:
    bare = unwrapped(backbone)
    half = bare.dtype in (torch.bfloat16, torch.float16)
    one_layer = tokens * bare.config.hidden_size * (2 if half else 4)
    kept = one_layer * _KEPT.get(bare.device.type, _KEPT["cuda"])
    layers = len(encoder_layers(backbone))
    if is_selective(backbone):
        return layers * one_layer * _KEPT_SELECTIVE + kept
    return layers * one_layer * _KEPT_CHECKPOINTED + kept if recomputes_layers(backbone) else layers * kept


def _share_at_once(trainer: SentenceTransformerTrainer) -> float:
    """The part of a batch whose activations are there together: cached losses go through it in chunks."""
    losses = list(trainer.loss.values()) if isinstance(trainer.loss, dict) else [trainer.loss]
    shares = [1.0]
    if all(service_of(loss) is Service.CHUNKED for loss in losses):
        shares = [getattr(loss, "mini_batch_size", trainer.args.train_batch_size) for loss in losses]
        shares = [min(1.0, size / trainer.args.train_batch_size) for size in shares]
    return max(shares)
