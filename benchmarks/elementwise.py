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
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from triton.errors import TritonError

from embtune.kernels.add_norm import NormKind, add_norm
from embtune.kernels.gated import gated, gated_halves, plain_gated, plain_gated_halves
from embtune.kernels.layer_norm import dropout_add_layer_norm
from embtune.kernels.norm_rotary import norm_rotate
from embtune.kernels.rms_norm import plain_rms_norm, rms_norm
from embtune.kernels.rotary import plain_rotate, plain_rotate_joined, rotate, rotate_joined
from embtune.runtime import describe_machine

Outputs: TypeAlias = Tensor | tuple[Tensor, ...]

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
    ours: Callable[..., Outputs]
    """The kernel."""
    eager: Callable[..., Outputs]
    """The same in PyTorch."""
    forward_passes: float
    """How often the forward pass has to read or write as much as all its outputs hold."""
    backward_passes: float
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


def angles(tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    turns = torch.arange(tokens, device="cuda")[:, None] % 512 * 1e4 ** -torch.linspace(0, 1, head_dim // 2).cuda()
    both = torch.cat((turns, turns), dim=-1)
    return both.cos(), both.sin()


def turned(tokens: int, heads: int, groups: int, head_dim: int) -> Case:
    tables = angles(tokens, head_dim)
    return Case(
        f"rotary embeddings [{tokens}, {heads} + {groups}, {head_dim}]",
        (states(tokens, heads, head_dim), states(tokens, groups, head_dim)),
        lambda q, k: rotate(q, k, *tables),
        lambda q, k: plain_rotate(q, k, *tables),
        2,
        2,
    )


def turned_joined(tokens: int, heads: int, head_dim: int) -> Case:
    tables = angles(tokens, head_dim)
    return Case(
        f"rotary embeddings of one projection [{tokens}, 3, {heads}, {head_dim}]",
        (states(tokens, 3, heads, head_dim),),
        lambda qkv: rotate_joined(qkv, *tables),
        lambda qkv: plain_rotate_joined(qkv, *tables),
        2,
        2,
    )


def normed_and_turned(tokens: int, heads: int, groups: int, head_dim: int) -> Case:
    tables, eps = angles(tokens, head_dim), 1e-6
    q_weight, k_weight = (states(head_dim).detach() for _ in range(2))
    return Case(
        f"RMSNorm of heads and rotary embeddings [{tokens}, {heads} + {groups}, {head_dim}]",
        (states(tokens, heads, head_dim), states(tokens, groups, head_dim)),
        lambda q, k: norm_rotate(q, k, q_weight, k_weight, eps, *tables),
        lambda q, k: plain_rotate(plain_rms_norm(q, q_weight, eps), plain_rms_norm(k, k_weight, eps), *tables),
        2,
        3,
    )


def streams(tokens: int, width: int, kind: NormKind) -> Case:
    weight = states(width).detach()

    def eager(residual: Tensor, hidden: Tensor) -> Outputs:
        total = residual + hidden
        if kind == "rms":
            return total, plain_rms_norm(total, weight, 1e-6).to(DTYPE)
        return total, F.layer_norm(total, (width,), weight.float(), None, 1e-6).to(DTYPE)

    # Of 6 bytes a place for both outputs: forward reads 6 and writes 8, backward reads 8 and writes 6.
    return Case(
        f"float32 stream + hidden, {kind} norm [{tokens}, {width}]",
        (states(tokens, width).detach().float().requires_grad_(), states(tokens, width)),
        lambda residual, hidden: add_norm(residual, hidden, weight, None, 1e-6, kind),
        eager,
        14 / 6,
        14 / 6,
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


def listed(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def both_ways(function: Callable[..., Outputs], inputs: tuple[Tensor, ...], flush: Tensor) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward pass."""
    trained = [each for each in inputs if each.requires_grad]
    outs = listed(function(*inputs))
    grads = [torch.randn_like(out) for out in outs]
    backward = partial(torch.autograd.grad, outs, trained, grads, retain_graph=True)
    return milliseconds(partial(function, *inputs), flush), milliseconds(backward, flush)


def measure(case: Case, flush: Tensor) -> None:
    expected, found = listed(case.eager(*case.inputs)), listed(case.ours(*case.inputs))
    gigabytes = sum(each.numel() * each.element_size() for each in found) / 1e9
    difference = max((one - other).abs().max().item() for one, other in zip(found, expected, strict=True))
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
    # ModernBERT-base on long texts, Qwen3-0.6B, Qwen2.5-0.5B.
    cases += [partial(turned_joined, 25_000, 12, 64), partial(streams, 25_000, 768, "layer")]
    cases += [partial(normed_and_turned, LARGE[0], 16, 8, 128), partial(streams, LARGE[0], 1024, "rms")]
    cases += [partial(turned, LARGE[0], 14, 2, 64)]
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
