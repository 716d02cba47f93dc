"""Whether compiling the encoder layers pays: it costs seconds once, and each step may then save milliseconds.

The estimate is a pure function of the run's size; what the machine can do enters in `decide` alone.
"""

import math
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

from embtune.errors import ArgumentError
from embtune.runtime import has_cpp_compiler, is_installed

MODES = ("auto", "never", "always")

NEVER = sys.maxsize
"""The threshold where a step saves nothing, so that no number of steps repays the compiling."""

# Compiling must promise a fifth more than it costs: both sides are estimates.
MARGIN = 1.2

# What follows for "cpu" comes from benchmarks/results/2026-11-22-compile-cpu.json (AMD EPYC, one thread).
# Uncompiled, LoRA and full: float32 57 to 87 GFLOP/s, bfloat16 88 to 255.
_CPU_FLOPS = {torch.float32: 70e9, torch.bfloat16: 150e9}
# MiniLM, no dropout: 38 s and 31 s, with checkpointing 52 s (LoRA; full is put in proportion).
_CPU_COST_SECONDS = {("lora", False): 38.0, ("lora", True): 52.0, ("full", False): 31.0, ("full", True): 43.0}
# No dropout, MiniLM and layers of BERT-base: float32 LoRA 3 to 5 %, with checkpointing 12 %; full 2 %; bfloat16 LoRA 8
# and 14 %, full -2 %. With dropout every row was slower by 4 to 16 %: compiled code draws its random numbers slowly.
_CPU_SAVED = {(torch.float32, "lora"): 0.035, (torch.float32, "full"): 0.02, (torch.bfloat16, "lora"): 0.08}
_CPU_SAVED_CHECKPOINTING = {(torch.float32, "lora"): 0.11}

# What follows for "cuda" was measured on one H200 with a slow host (docs/decisions.md, "Compiled layers on a GPU"): the
# first six steps of BERT-base with LoRA took 57 s, and a step's kernels 15.4 ms where they had taken 23.3.
_CUDA_COST_SECONDS = 56.0
_CUDA_SAVED = 0.34
# From DESIGN.md, not from this code: both scale with the host.
# §8: BERT-base takes 180 ms even where there is next to nothing to compute: launching 12 layers' kernels.
_CUDA_LAUNCH_SECONDS = 0.015
# §8: the padded 349 ms less those 180, for 128 × (30 + 512) tokens, at full padding.
_CUDA_FLOPS = 140e12


@dataclass(frozen=True, kw_only=True)
class CompileEstimate:
    """What compiling costs a run and saves it per step.

    Raises:
        ArgumentError: a field has a value that cannot be estimated for; the message names it.
    """

    parameters: int
    """Numbers in the encoder layers (`layer_parameters`); embeddings cost no arithmetic."""
    tokens_per_step: int
    """Tokens that the encoder sees in an optimizer step, all columns, padding included."""
    device: str = "cpu"
    """`cpu` or `cuda`."""
    trainable: str = "lora"
    """`lora` or `full`: which weights get gradients."""
    checkpointing: bool = False
    """Whether layers are recomputed in the backward pass."""
    dtype: torch.dtype = torch.float32
    """Of the base weights; told apart on a CPU only."""
    dropout: bool = True
    """Whether the encoder layers drop anything in training; told apart on a CPU only."""
    layers: int = 12
    """Encoder layers; matter on CUDA only, where launching their kernels takes time."""
    threads: int = 1
    """Processor threads that compute; matter on a CPU only."""
    step_seconds: float | None = None
    """What an uncompiled step takes here, where it was measured; replaces the estimate of it."""

    def __post_init__(self) -> None:
        for name in ("parameters", "tokens_per_step", "layers", "threads"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.step_seconds is not None and self.step_seconds <= 0:
            raise ArgumentError(f"step_seconds={self.step_seconds} must be above 0.")
        if self.device not in ("cpu", "cuda"):
            raise ArgumentError(f'device={self.device!r}: compiling has been measured on "cpu" and "cuda" only.')
        if self.trainable not in ("lora", "full"):
            raise ArgumentError(f'trainable={self.trainable!r} is not known; use "lora" or "full".')

    @property
    def uncompiled_seconds(self) -> float:
        """Seconds of a step without compiling."""
        if self.step_seconds is not None:
            return self.step_seconds
        # A pass over a matrix of n numbers costs 2n operations a token: forward, gradient of the input, and where they
        # are trained gradient of the weights; checkpointing repeats the forward.
        passes = 2 + (self.trainable == "full") + self.checkpointing
        operations = 2 * passes * self.parameters * self.tokens_per_step
        if self.device == "cuda":
            return self.layers * _CUDA_LAUNCH_SECONDS + operations / _CUDA_FLOPS
        return operations / (_CPU_FLOPS.get(self.dtype, _CPU_FLOPS[torch.float32]) * self.threads)

    @property
    def saving_seconds(self) -> float:
        """Seconds that compiled layers save per step; 0 where they were measured to be no faster."""
        return self.uncompiled_seconds * self._saved

    @property
    def _saved(self) -> float:
        if self.device == "cuda":
            return _CUDA_SAVED
        if self.dropout:
            return 0.0
        kind = (self.dtype, self.trainable)
        saved = _CPU_SAVED.get(kind, 0.0)
        return _CPU_SAVED_CHECKPOINTING.get(kind, saved) if self.checkpointing else saved

    @property
    def cost_seconds(self) -> float:
        """Seconds until every variant of the layer that training calls is compiled; hardly depends on its size."""
        if self.device == "cuda":
            return _CUDA_COST_SECONDS
        return _CPU_COST_SECONDS[self.trainable, self.checkpointing]

    @property
    def threshold(self) -> int:
        """The fewest steps with `steps × saving > 1.2 × cost`, or `NEVER`."""
        if self.saving_seconds == 0:
            return NEVER
        return math.floor(MARGIN * self.cost_seconds / self.saving_seconds) + 1


def compile_threshold(
    parameters: int,
    tokens_per_step: int,
    *,
    device: str = "cpu",
    trainable: str = "lora",
    checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
    dropout: bool = True,
    layers: int = 12,
    threads: int = 1,
    step_seconds: float | None = None,
) -> int:
    """Steps from which on compiling the encoder layers pays; `NEVER` where it saves nothing.

    It falls with model size, tokens and time per step, and rises with processor threads. The arguments are the fields
    of `CompileEstimate`, which says what each means.

    Raises:
        ArgumentError: an argument has a value that cannot be estimated for.
    """
    return CompileEstimate(
        parameters=parameters,
        tokens_per_step=tokens_per_step,
        device=device,
        trainable=trainable,
        checkpointing=checkpointing,
        dtype=dtype,
        dropout=dropout,
        layers=layers,
        threads=threads,
        step_seconds=step_seconds,
    ).threshold


@dataclass(frozen=True, kw_only=True)
class CompileDecision:
    """Whether a run compiles, with the numbers behind it; a checkpoint keeps it so that a resumed run does the same."""

    compile: bool
    """The decision."""
    reason: str
    """One line with its numbers."""
    steps_left: int
    """Steps that were left when it was taken."""
    threshold: int | None = None
    """Steps from which on compiling would pay (`NEVER`: it saves nothing); None where nothing was estimated."""
    cost_seconds: float | None = None
    """Estimated seconds of compiling."""
    saving_seconds: float | None = None
    """Estimated seconds saved per step."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CompileDecision":
        """The decision that `to_dict` wrote."""
        return cls(**values)


def decide(mode: str, *, steps_left: int, device: str = "cpu", **settings: Any) -> CompileDecision:
    """Decide whether a run of `steps_left` optimizer steps compiles its encoder layers.

    Args:
        mode: `auto` weighs cost against saving; `never` and `always` do as they say.
        settings: the other fields of `CompileEstimate`.

    Raises:
        ArgumentError: `mode` is unknown, or is `always` where this machine cannot compile.
    """
    if mode not in MODES:
        raise ArgumentError(f"compile={mode!r} is not known; use one of {', '.join(MODES)}.")
    if mode == "never":
        return CompileDecision(compile=False, reason='off, as asked (compile="never")', steps_left=steps_left)
    obstacle = "the model has no encoder layers" if settings.get("layers") == 0 else _obstacle(device)
    if obstacle is not None:
        if mode == "always":
            raise ArgumentError(f'compile="always" cannot be honoured: {obstacle}. Or use compile="auto".')
        return CompileDecision(compile=False, reason=f"off: {obstacle}", steps_left=steps_left)
    estimate = CompileEstimate(device=device, **settings)
    pays = steps_left >= estimate.threshold
    weighed = _weighed(estimate, steps_left, pays)
    return CompileDecision(
        compile=pays or mode == "always",
        reason=weighed if mode == "auto" else f'on, as asked (compile="always"); auto would say {weighed}',
        steps_left=steps_left,
        threshold=estimate.threshold,
        cost_seconds=estimate.cost_seconds,
        saving_seconds=estimate.saving_seconds,
    )


def _obstacle(device: str) -> str | None:
    """What keeps layers from being compiled, with the remedy, or None."""
    if device == "cpu":
        return None if has_cpp_compiler() else "no C++ compiler was found; install g++ or clang, or name it in CXX"
    if device == "cuda":
        return None if is_installed("triton") else "the package triton is not installed; pip install triton"
    return f"compiling has not been measured on {device}"


def _weighed(estimate: CompileEstimate, steps_left: int, pays: bool) -> str:
    if estimate.threshold == NEVER:
        layers = f"{str(estimate.dtype).removeprefix('torch.')} layers"
        layers += " with the checkpoint's own dropout" if estimate.dropout else ""
        return f"off: on a CPU, compiled {layers} were not faster ({estimate.trainable} training)"
    saved = f"{steps_left:,} steps × {1000 * estimate.saving_seconds:,.1f} ms saved"
    verdict, comparison = ("on", "repay") if pays else ("off", "do not repay")
    cost = f"{MARGIN} × {estimate.cost_seconds:.0f} s of compiling"
    return f"{verdict}: {saved} {comparison} {cost}, which pays from {estimate.threshold:,} steps on"
