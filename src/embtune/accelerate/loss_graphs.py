"""Replay a loss of embeddings, and its gradient, as one CUDA graph.

A contrastive loss and its backward pass are about a hundred small kernels; a GPU that has just embedded short texts is
done with each of them before the host has launched the next.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from embtune.accelerate.recording import record
from embtune.errors import EmbtuneWarning

Loss = Callable[[list[dict[str, Any]], Tensor | None], Tensor]
"""From the features of each column, `sentence_embedding` [N, D] among them, and labels, to a scalar."""

_EMBEDDING = "sentence_embedding"
# Whole batches, the last one, and those of a few datasets or settings.
_LIMIT = 8


@dataclass(eq=False)
class _Recording:
    """The graph of a loss for embeddings and labels of one size, and the memory that it reads and writes."""

    embeddings: list[Tensor]
    labels: Tensor | None
    graph: torch.cuda.CUDAGraph
    loss: Tensor
    gradients: Tensor
    """Of all embeddings, below each other."""


class LossGraphs:
    """The recordings of the losses of one run, on one device.

    Args:
        stream: on which to record; that of other recordings, which share its libraries' workspaces.
        strict: whether a loss that cannot be recorded is an error, or a warning after which all are called.
    """

    def __init__(self, stream: torch.cuda.Stream, *, strict: bool = True) -> None:
        self._stream = stream
        self._strict = strict
        self._limit = _LIMIT
        self._recordings: dict[Hashable, _Recording] = {}
        # Not the encoder's: between its forward and its backward, what those graphs hold must stay as it is.
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def count(self) -> int:
        """How many graphs were recorded so far."""
        return len(self._recordings)

    def __call__(self, loss: Loss, settings: Hashable, columns: list[dict[str, Any]], labels: Tensor | None) -> Tensor:
        """`loss(columns, labels)`, differentiable in the embeddings [N, D] of `columns`.

        Args:
            settings: all else that the loss depends on.
        """
        embeddings = [column[_EMBEDDING] for column in columns]
        exact = all(part.dtype == torch.float32 for part in embeddings)
        # A gradient scaled only after products in float16 would have lost its smallest parts in them.
        exact = exact and _autocast() is not torch.float16
        if not torch.is_grad_enabled() or not exact or not isinstance(labels, Tensor | None):
            return loss(columns, labels)
        label_kind = None if labels is None else (labels.shape, labels.dtype)
        key = (loss, settings, tuple(part.shape for part in embeddings), label_kind, _autocast())
        if key not in self._recordings:
            if len(self._recordings) >= self._limit:
                return loss(columns, labels)
            try:
                self._recordings[key] = self._record(loss, columns, labels)
            except RuntimeError as error:
                if self._strict:
                    raise
                self._limit = 0
                warnings.warn(f"CUDA graphs: the loss goes without, because {error}", EmbtuneWarning, stacklevel=2)
                return loss(columns, labels)
        recording = self._recordings[key]
        if labels is not None and recording.labels is not None:
            recording.labels.copy_(labels, non_blocking=True)
        return _Replay.apply(recording, *embeddings)

    def _record(self, loss: Loss, columns: Sequence[dict[str, Any]], labels: Tensor | None) -> _Recording:
        device = columns[0][_EMBEDDING].device
        counts = [len(column[_EMBEDDING]) for column in columns]
        rows = torch.cat([column[_EMBEDDING].detach() for column in columns]).requires_grad_()
        own_labels = None if labels is None else labels.to(device, copy=True)

        def run() -> tuple[Tensor, Tensor]:
            own = [{**column, _EMBEDDING: part} for column, part in zip(columns, rows.split(counts), strict=True)]
            with torch.autocast("cuda", _autocast(), enabled=_autocast() is not None, cache_enabled=False):
                value = loss(own, own_labels)
            return value.detach(), torch.autograd.grad(value, rows)[0]

        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()  # libraries set up what they keep
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with record(graph, self._pool, self._stream):
            value, gradients = run()
        return _Recording(list(rows.detach().split(counts)), own_labels, graph, value, gradients)


class _Replay(torch.autograd.Function):
    """A loss and, while it is at it, its gradient, which the backward pass only scales."""

    @staticmethod
    def forward(ctx: Any, recording: _Recording, *embeddings: Tensor) -> Tensor:
        torch._foreach_copy_(recording.embeddings, list(embeddings))
        recording.graph.replay()
        # Copies, since a later batch may come before this one's backward.
        ctx.save_for_backward(recording.gradients.clone())
        ctx.counts = [len(part) for part in embeddings]
        return recording.loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        return None, *(gradients * gradient).split(ctx.counts)


def _autocast() -> torch.dtype | None:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
