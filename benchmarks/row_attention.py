"""How long the kernels of `row_attention` take on a CUDA device, tile by tile, beside PyTorch's FlashAttention-2.

Run `python benchmarks/row_attention.py` (under 90 seconds), or name some of the workloads. For each it prints the time
of FlashAttention-2 forward and backward, then each kernel with each tile: milliseconds, and the largest distance from
float64, measured on the row's first texts as a share of the largest number there; at the end, the tiles that
`choose_tiles` gives and the fastest ones, summed up. Times are those of launches replayed from a CUDA graph, so they do
not depend on how fast the host launches.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from triton.testing import do_bench_cudagraph

from embtune.kernels.row_attention import text_bounds
from embtune.kernels.row_attention_launch import AttentionTile, AttentionTiles, RowAttention, choose_tiles
from embtune.kernels.row_attention_plain import plain_row_attention

# Tokens that the float64 twin computes: its table of scores is that large, squared, for each head.
_CHECKED = 1024


@dataclass(frozen=True)
class Workload:
    """One layer's attention in one step."""

    texts: tuple[tuple[int, float], ...]
    """How many texts of which mean length; their lengths are lognormal."""
    heads: int
    groups: int
    head_dim: int
    causal: bool = False
    window: int = -1
    dropout: float = 0.0
    distances: int | None = None
    """Of a relative bias; FlashAttention-2 takes none and is measured without."""

    def lengths(self) -> list[int]:
        generator = torch.Generator().manual_seed(0)
        found: list[int] = []
        for count, mean in self.texts:
            spread = 0.5
            normal = torch.randn(count, generator=generator) * spread + math.log(mean) - spread**2 / 2
            found += normal.exp().round().clamp(2, 512).int().tolist()
        return found


MEDQUAD, NL2BASH = ((128, 15), (128, 195)), ((128, 22), (128, 23))
WORKLOADS = {
    "bert-medquad": Workload(MEDQUAD, 12, 12, 64, dropout=0.1),
    "bert-nl2bash": Workload(NL2BASH, 12, 12, 64, dropout=0.1),
    "bert-medquad-no-dropout": Workload(MEDQUAD, 12, 12, 64),
    "qwen3-medquad": Workload(((32, 15), (32, 195)), 16, 8, 128, causal=True),
    "mpnet-medquad": Workload(MEDQUAD, 12, 12, 64, dropout=0.1, distances=257),
    "minilm-nl2bash": Workload(((256, 22), (256, 23)), 12, 12, 32, dropout=0.1),
    "modernbert-window": Workload(((64, 22), (64, 371)), 12, 12, 64, window=64),
}
ROWS = {  # queries, keys, warps, stages; key_value_gradients has queries and keys the other way round
    64: [(64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 3), (64, 128, 4, 2), (128, 64, 8, 2)],
    128: [(64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 3), (128, 32, 8, 2), (128, 64, 8, 2)],
}


class Bench:
    """The tensors of a workload."""

    def __init__(self, workload: Workload) -> None:
        torch.manual_seed(0)
        self.workload, self.lengths = workload, workload.lengths()
        self.tokens = sum(self.lengths)
        borders = torch.tensor([0, *self.lengths]).cumsum(0).int()
        self.borders = borders.cuda()
        self.checked = int(borders[borders <= _CHECKED].max())
        heads, shared = (self.tokens, workload.heads), (self.tokens, workload.groups)
        self.q, self.k, self.v, self.grad = (
            torch.randn(*rows, workload.head_dim, device="cuda").bfloat16() for rows in (heads, shared, shared, heads)
        )
        self.bias = None if workload.distances is None else torch.randn(workload.heads, workload.distances).cuda()
        self.seed = torch.tensor([7], device="cuda") if workload.dropout else None
        after = 0 if workload.causal else workload.window
        self.row = RowAttention(
            choose_tiles(workload.head_dim, torch.bfloat16),
            *(self.q, self.k, self.v),
            *text_bounds(self.borders, self.tokens),
            *(self.bias, self.seed, workload.head_dim**-0.5, workload.window, after, workload.dropout),
        )
        self.out, self.q_grad, self.k_grad, self.v_grad = map(torch.empty_like, (self.q, self.q, self.k, self.v))
        self.lse, self.delta = torch.empty(2, workload.heads, self.tokens, device="cuda")

    def kernels(self) -> dict[str, tuple[Callable[[RowAttention], None], dict[str, Tensor]]]:
        """Each kernel's launch, and what it fills."""
        out, grad, lse, delta = self.out, self.grad, self.lse, self.delta
        q_grad, k_grad, v_grad = self.q_grad, self.k_grad, self.v_grad
        return {
            "attend": (lambda row: row.attend(out, lse), {"out": out}),
            "query_gradients": (lambda row: row.query_gradients(out, grad, lse, delta, q_grad), {"q": q_grad}),
            "key_value_gradients": (
                lambda row: row.key_value_gradients(grad, lse, delta, k_grad, v_grad),
                {"k": k_grad, "v": v_grad},
            ),
        }

    def flash(self) -> tuple[float, float]:
        """Milliseconds of FlashAttention-2 forward and backward."""
        work, longest = self.workload, max(self.lengths)
        reach = {} if work.window < 0 else {"window_size_left": work.window, "window_size_right": work.window}
        spans = (self.borders, self.borders, longest, longest, work.dropout, work.causal)
        states = (self.q, self.k, self.v)

        def forward() -> tuple[Tensor, ...]:
            return torch.ops.aten._flash_attention_forward(*states, *spans, False, **reach)

        out, lse, state, unused, _ = forward()

        def backward() -> None:
            torch.ops.aten._flash_attention_backward(self.grad, *states, out, lse, *spans, state, unused, **reach)

        return milliseconds(forward), milliseconds(backward)

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        """The first texts' output and gradients in float64."""
        few, work = slice(self.checked), self.workload
        q, k, v = (states[few].double().requires_grad_() for states in (self.q, self.k, self.v))
        bounds = text_bounds(self.borders[self.borders <= self.checked], self.checked)
        settings = {"causal": work.causal, "window": (work.window, work.window), "dropout": work.dropout}
        bias = None if self.bias is None else self.bias.double()
        out = plain_row_attention(q, k, v, *bounds, bias_HR=bias, seed=self.seed, **settings)
        grads = torch.autograd.grad(out, (q, k, v), self.grad[few].double())
        return {"out": out.detach(), **dict(zip("qkv", grads, strict=True))}

    def error(self, filled: dict[str, Tensor]) -> float:
        pairs = [(part[: self.checked].double(), self.exact[name]) for name, part in filled.items()]
        return max(float((found - exact).abs().max() / exact.abs().max()) for found, exact in pairs)


def milliseconds(function: Callable[[], object]) -> float:
    return do_bench_cudagraph(function, rep=5)


def candidates(kernel: str, chosen: AttentionTile, head_dim: int) -> list[AttentionTile]:
    """The tile that is chosen, and others."""
    turned = kernel == "key_value_gradients"
    shapes = [(k, q, *rest) if turned else (q, k, *rest) for q, k, *rest in ROWS[64 if head_dim <= 64 else 128]]
    return list(dict.fromkeys([chosen, *(AttentionTile(*shape) for shape in shapes)]))


def sweep(name: str, bench: Bench, deadline: float) -> None:
    """Print the table of one workload."""
    print(f"\n{name}: {bench.tokens} tokens in {len(bench.lengths)} texts, longest {max(bench.lengths)}")
    try:
        flash = bench.flash()
        print(f"  FlashAttention-2     forward {flash[0]:.4f} ms, backward {flash[1]:.4f} ms")
    except Exception as problem:  # noqa: BLE001  the table is worth having without it
        print(f"  FlashAttention-2     failed: {first_line(problem)}")
        flash = (math.nan, math.nan)
    default: dict[str, float] = {}
    best: dict[str, float] = {}
    for kernel, (launch, filled) in bench.kernels().items():
        chosen = getattr(bench.row.tiles, kernel)
        # The next kernel reads what the chosen tile has filled: it comes last.
        for tile in reversed(candidates(kernel, chosen, bench.workload.head_dim)):
            if tile != chosen and time.monotonic() > deadline:
                continue
            row = replace(bench.row, tiles=AttentionTiles(tile, tile, tile))
            label = f"  {kernel:20} {tile.queries:3} x {tile.keys:3}  {tile.warps} warps  {tile.stages} stages"
            try:
                launch(row)
                error, time_ms = bench.error(filled), milliseconds(lambda launch=launch, row=row: launch(row))
            except Exception as problem:  # noqa: BLE001  a tile that does not fit is a result
                print(f"{label}  failed: {first_line(problem)}")
                continue
            best[kernel] = min(time_ms, best.get(kernel, math.inf))
            if tile == chosen:
                default[kernel] = time_ms
            print(f"{label}  {time_ms:.4f} ms  error {error:.1e}{'  (chosen)' if tile == chosen else ''}", flush=True)
    for title, times in (("chosen tiles", default), ("fastest tiles", best)):
        forward = times.get("attend", math.nan)
        backward = times.get("query_gradients", math.nan) + times.get("key_value_gradients", math.nan)
        print(
            f"  {title:20} forward {forward:.4f} ms ({flash[0] / forward:.2f} times as fast), "
            f"backward {backward:.4f} ms ({flash[1] / backward:.2f} times)"
        )


def first_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {str(problem).strip().splitlines()[0][:120] if str(problem).strip() else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of: {', '.join(WORKLOADS)}; default: all")
    parser.add_argument("--seconds", type=float, default=75, help="after these, only the chosen tiles are measured")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.workloads if name not in WORKLOADS]
    if unknown:
        parser.error(f"unknown workload {unknown[0]!r}; there are: {', '.join(WORKLOADS)}")
    if not torch.cuda.is_available():
        parser.error("no CUDA device: these times mean nothing elsewhere.")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16")
    deadline = time.monotonic() + arguments.seconds
    for name in arguments.workloads or WORKLOADS:
        sweep(name, Bench(WORKLOADS[name]), deadline)


if __name__ == "__main__":
    main()
