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
    generator = torch.cuda.default_generators[stream.device.index]
    state = generator.get_state()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            yield
    except RuntimeError:
        # PyTorch's random numbers believe from now on that the recording still goes on: they get a state that does not.
        fresh = torch.Generator(stream.device)
        fresh.set_state(state)
        generator.graphsafe_set_state(fresh)
        raise
