"""What a run will take, estimated before its first step."""

from dataclasses import dataclass
from typing import Any

import torch

from embtune.accelerate.breakeven import CompileEstimate
from embtune.losses.services import Service, service_of
from embtune.models.checkpointing import describe_gradient_checkpointing
from embtune.models.families import encoder_layers, unwrapped
from embtune.models.modules import transformer_modules
from embtune.train.compiling import compile_settings, steps_of_run
from embtune.train.trainer import SentenceTransformerTrainer

# Numbers that a layer keeps for its backward pass, per token and hidden unit. From benchmarks/results: BERT-base with
# LoRA on one H200, 12.4 GiB at 128 × 210 tokens (train_gpu.jsonl); MiniLM on a CPU, 3.3 GiB at a batch of 64
# (train_cpu.jsonl), where attention keeps its scores.
_KEPT = {"cuda": 26, "cpu": 44}
_KEPT_CHECKPOINTED = 1
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


def estimate_run(trainer: SentenceTransformerTrainer, tokens_per_step: float) -> RunEstimate:
    """Estimate from the sizes of model and batch alone; within a factor of two or three, not closer.

    Args:
        tokens_per_step: what the encoder computes in a step, padding included where it pads.
    """
    device = trainer.model.device.type
    settings = compile_settings(trainer) | {"tokens_per_step": max(1, round(tokens_per_step))}
    known = device in ("cpu", "cuda")
    seconds = CompileEstimate(**settings).uncompiled_seconds if known else None
    return RunEstimate(steps_of_run(trainer), seconds, round(_memory(trainer, tokens_per_step)))


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
    if describe_gradient_checkpointing(backbone) == "off":
        return layers * kept
    return layers * one_layer * _KEPT_CHECKPOINTED + kept


def _share_at_once(trainer: SentenceTransformerTrainer) -> float:
    """The part of a batch whose activations are there together: cached losses go through it in chunks."""
    losses = list(trainer.loss.values()) if isinstance(trainer.loss, dict) else [trainer.loss]
    shares = [1.0]
    if all(service_of(loss) is Service.CHUNKED for loss in losses):
        shares = [getattr(loss, "mini_batch_size", trainer.args.train_batch_size) for loss in losses]
        shares = [min(1.0, size / trainer.args.train_batch_size) for size in shares]
    return max(shares)
