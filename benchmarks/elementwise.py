"""Time of each element-wise kernel on one CUDA GPU, forward and backward, beside eager PyTorch.

    python benchmarks/elementwise.py

Prints milliseconds and GB/s. GB/s counts what the fused kernel has to read and write, for both columns alike, so that
they compare. The weights of norms are frozen, as with LoRA, unless the line says otherwise.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from triton.errors import TritonError

from embtune.kernels.gated import gated, gated_halves, plain_gated, plain_gated_halves
from embtune.kernels.layer_norm import dropout_add_layer_norm
from embtune.kernels.rms_norm import plain_rms_norm, rms_norm
from embtune.runtime import describe_machine

BASE, LARGE = (27_150, 768, 3072), (6_800, 1024, 3072)
DTYPE = torch.bfloat16
REPEATS = 30


@dataclass(frozen=True)
class Case:
    """One operation at one size."""

    name: str
    """What the line is called."""
    inputs: tuple[Tensor, ...]
    """Those that require a gradient get one."""
    ours: Callable[..., Tensor]
    """The kernel."""
    eager: Callable[..., Tensor]
    """The same in PyTorch."""
    forward_passes: int
    """How often the forward pass has to read or write a tensor as large as the output."""
    backward_passes: int
    """The same for the backward pass."""


def states(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE, requires_grad=True)


def norms(tokens: int, width: int, p: float, train_weights: bool) -> Case:
    weight, bias = (states(width).detach().requires_grad_(train_weights) for _ in range(2))
    seed = torch.tensor([1], device="cuda")
    return Case(
        f"dropout {p} + residual + LayerNorm [{tokens}, {width}]{' with weight gradients' if train_weights else ''}",
        (states(tokens, width), states(tokens, width), weight, bias),
        lambda hidden, residual, weight, bias: dropout_add_layer_norm(hidden, residual, weight, bias, 1e-12, p, seed),
        lambda hidden, residual, weight, bias: F.layer_norm(
            F.dropout(hidden, p) + residual, (width,), weight, bias, 1e-12
        ),
        4,
        4 if p else 3,
    )


def rms(tokens: int, width: int, train_weights: bool) -> Case:
    return Case(
        f"RMSNorm [{tokens}, {width}]{' with weight gradients' if train_weights else ''}",
        (states(tokens, width), states(width).detach().requires_grad_(train_weights)),
        lambda x, weight: rms_norm(x, weight, 1e-6),
        lambda x, weight: plain_rms_norm(x, weight, 1e-6),
        2,
        3,
    )


def gates(tokens: int, width: int, activation: str) -> Case:
    return Case(
        f"{activation}(gate) · up [{tokens}, {width}]",
        (states(tokens, width), states(tokens, width)),
        lambda gate, up: gated(gate, up, activation),
        lambda gate, up: plain_gated(gate, up, activation),
        3,
        5,
    )


def halves(tokens: int, width: int, activation: str) -> Case:
    return Case(
        f"{activation}(left) · right [{tokens}, 2 × {width}]",
        (states(tokens, 2 * width),),
        lambda both: gated_halves(both, activation),
        lambda both: plain_gated_halves(both, activation),
        3,
        5,
    )


def milliseconds(run: Callable[[], object], flush: Tensor) -> float:
    """Median time of the kernels that a call launches.

    Before each call two GiB are written: that empties the cache, and gives a slow processor the time to launch the
    call's kernels while the device is still busy, so that no waiting for launches is timed.
    """
    run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
    for start, end in events:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def both_ways(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], flush: Tensor) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward pass."""
    trained = [each for each in inputs if each.requires_grad]
    out = function(*inputs)
    grad = torch.randn_like(out)
    backward = partial(torch.autograd.grad, out, trained, grad, retain_graph=True)
    return milliseconds(partial(function, *inputs), flush), milliseconds(backward, flush)


def measure(case: Case, flush: Tensor) -> None:
    expected, found = case.eager(*case.inputs), case.ours(*case.inputs)
    gigabytes = expected.numel() * expected.element_size() / 1e9
    difference = (found - expected).abs().max().item()
    del expected, found
    times = [both_ways(function, case.inputs, flush) for function in (case.ours, case.eager)]
    print(f"{case.name}   (largest difference {difference:.2g}; with dropout the masks differ)")
    passes = (case.forward_passes, case.backward_passes)
    for direction, count, ours, eager in zip(("forward", "backward"), passes, *times, strict=True):
        rates = [count * gigabytes / each * 1e3 for each in (ours, eager)]
        print(
            f"    {direction:8}  ours {ours:7.4f} ms {rates[0]:6.0f} GB/s    eager {eager:7.4f} ms {rates[1]:6.0f} GB/s"
            f"    {eager / ours:5.2f} ×"
        )


def main() -> None:
    print(json.dumps(describe_machine(torch.device("cuda"))))
    flush = torch.empty(2**31, dtype=torch.int8, device="cuda")
    cases: list[Callable[[], Case]] = []
    for tokens, width, inner in (BASE, LARGE):
        cases += [partial(norms, tokens, width, p, False) for p in (0.1, 0.0)]
        cases += [partial(norms, tokens, width, 0.1, True)]
        cases += [partial(rms, tokens, width, train) for train in (False, True)]
        cases += [partial(gates, tokens, inner, activation) for activation in ("silu", "gelu_tanh")]
        cases += [partial(halves, tokens, inner, "gelu")]
    # The query norms of Qwen3-0.6B (16 heads of 128), ModernBERT-base's gate.
    cases += [partial(rms, LARGE[0] * 16, 128, False), partial(halves, 25_000, 1152, "gelu")]
    for make in cases:
        try:
            measure(make(), flush)
        except (RuntimeError, ValueError, TritonError) as error:
            # One that does not compile, or does not fit, must not hide the others.
            print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
