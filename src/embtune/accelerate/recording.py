"""Record a CUDA graph, such that a recording that fails leaves PyTorch as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def record(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> Iterator[None]:
    """Record what the device is given within this context into `graph`, on `stream`, with memory of `pool`.

    Raises:
        RuntimeError: something within cannot be recorded, such as waiting for the device.
    """
    before = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            yield
    except RuntimeError:
        torch.cuda.set_stream(before)  # PyTorch stays on the other one
        # PyTorch before 2.13 takes this recording for one that still goes on whenever a number is drawn, until some
        # recording ends well.
        unused = torch.zeros(1, device=stream.device)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            unused.zero_()
        raise
