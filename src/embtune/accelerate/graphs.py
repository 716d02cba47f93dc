"""Replay the encoder's forward and backward as CUDA graphs: one launch each instead of thousands of kernels'.

A graph repeats exactly the kernels it recorded, on the addresses it recorded. So rows are filled up to one of a few
sizes (`Shape`), inputs are copied to where the graph reads them, and it adds to gradients that all graphs share.
"""

import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embtune.accelerate.recording import record
from embtune.accelerate.row_sizes import UNKNOWN
from embtune.errors import EmbtuneWarning
from embtune.packing.attention import TILES_LENGTH
from embtune.packing.row import PackedRow

Embed = Callable[[PackedRow, int], Tensor]
"""From a flat row, and the length that no text of it exceeds, to the embeddings [N, D] of its texts."""

# Passes on a side stream before the first recording: libraries set up their workspaces, and kernels are compiled.
_WARM_UP = 2
# FlashAttention launches blocks for the longest text that a graph may hold; those of a shorter row return at once.
_LENGTH_STEP = TILES_LENGTH


@dataclass(frozen=True)
class Shape:
    """What a graph is recorded for."""

    tokens: int
    """Tokens of the row, those that fill it up included."""
    texts: int
    """Texts that somebody asked for."""
    fillers: int
    """Texts that fill up; each has at least one token, and no more than the longest."""
    max_length: int
    """No text is longer."""

    @classmethod
    def of(cls, lengths: Sequence[int], step: int) -> "Shape":
        """The smallest shape that holds texts of these lengths; its tokens are a multiple of `step`."""
        longest = math.ceil(max(lengths) / _LENGTH_STEP) * _LENGTH_STEP
        fillers = math.ceil((step + 1) / longest)
        tokens = math.ceil((sum(lengths) + fillers) / step) * step
        return cls(tokens, len(lengths), fillers, longest)

    def borders(self, lengths: Sequence[int]) -> Tensor:
        """The borders [N + 1] int32 of texts of these lengths and of the fillers behind them."""
        spare, count = self.tokens - sum(lengths), self.fillers
        fillers = [spare // count + (index < spare % count) for index in range(count)]
        return torch.from_numpy(np.cumsum([0, *lengths, *fillers], dtype=np.int32))


@dataclass(eq=False)
class _Recording:
    """The graphs of one shape, and the memory that they read and write."""

    shape: Shape
    row: PackedRow
    forward: torch.cuda.CUDAGraph
    embeddings: Tensor
    backward: torch.cuda.CUDAGraph
    embeddings_grad: Tensor
    used: list[int]
    """Which of the parameters the backward adds a gradient to."""


class SharedGradients:
    """Gradients in memory that stays, to which the backward passes of all graphs add."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._sums = [torch.empty_like(parameter) for parameter in self._parameters]

    def add(self, found: Sequence[Tensor | None]) -> list[int]:
        """Add a gradient for each parameter that has one, and return which have; this is what a graph records."""
        used = {index: gradient for index, gradient in enumerate(found) if gradient is not None}
        torch._foreach_add_([self._sums[index] for index in used], list(used.values()))
        return list(used)

    def collect(self, replay: Callable[[], None], used: Sequence[int]) -> None:
        """Replay an `add`, for the parameters that it returned; the others keep the gradient they have, or none."""
        stale, strangers = [], []
        for parameter, sum_ in ((self._parameters[index], self._sums[index]) for index in used):
            if parameter.grad is sum_:
                continue
            stale.append(sum_)
            if parameter.grad is None:
                parameter.grad = sum_
            else:  # of an ordinary backward before this one
                strangers.append((parameter.grad, sum_))
        if stale:
            torch._foreach_zero_(stale)
        replay()
        if strangers:
            torch._foreach_add_([gradient for gradient, _ in strangers], [sum_ for _, sum_ in strangers])


class _Ticket:
    """Lives as long as somebody may still ask for the backward of a forward."""


class EncoderGraphs:
    """The recordings of one model during one run. On one device, without gradient checkpointing.

    Args:
        embed: the pass itself; must not wait for the device, nor do anything else for another row of the same shape.
        parameters: those that are trained.
        autocast: the dtype of `torch.autocast` in the pass, or None.
        limit: shapes recorded at most; rows of further ones are left to the caller.
        step: rows are filled up to a multiple of so many tokens; may be set anew before the first row.
        strict: whether a pass that cannot be recorded is an error, or a warning after which every row is left to the
            caller.
    """

    def __init__(
        self,
        embed: Embed,
        parameters: Sequence[nn.Parameter],
        *,
        autocast: torch.dtype | None = None,
        limit: int = 16,
        step: int = UNKNOWN,
        strict: bool = True,
    ) -> None:
        self._embed = embed
        self._parameters = list(parameters)
        self._autocast = autocast
        self._limit = limit
        self.strict = strict
        self.step = step
        self._recordings: dict[Shape, _Recording] = {}
        self.gradients = SharedGradients(self._parameters)
        self._pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()
        self._ticket: weakref.ref[_Ticket] | None = None

    @property
    def shapes(self) -> list[Shape]:
        """The shapes recorded so far."""
        return list(self._recordings)

    def __call__(self, row: PackedRow) -> Tensor | None:
        """The embeddings [N, D] of a row, differentiable; None where no graph serves and the caller has to embed it.

        Adds to the gradients of `parameters` in the backward pass, as autograd would.
        """
        if not torch.is_grad_enabled() or (self._ticket is not None and self._ticket() is not None):
            return None  # or a forward still waits for its backward, whose states this one would overwrite
        shape = Shape.of(row.lengths, self.step)
        if shape not in self._recordings:
            if len(self._recordings) >= self._limit:
                return None
            try:
                # What recording draws must not show in later steps: a resumed run records again, and drops the same.
                with torch.random.fork_rng([row.tokens_3T.device]):
                    self._recordings[shape] = self._record(row, shape)
            except RuntimeError as error:
                if self.strict:
                    raise
                self._limit = 0
                warnings.warn(f"CUDA graphs: off for further sizes, because {error}", EmbtuneWarning, stacklevel=2)
                return None
        recording = self._recordings[shape]
        _copy(row, recording)
        ticket = _Ticket()
        self._ticket = weakref.ref(ticket)
        return _Replay.apply(self._parameters[0], self, recording, ticket)[: shape.texts]

    def _record(self, row: PackedRow, shape: Shape) -> _Recording:
        if any(weight._backward_hooks or weight._post_accumulate_grad_hooks for weight in self._parameters):
            raise RuntimeError("hooks on the parameters wait for gradients, which a replay adds without autograd")
        static = _static_row(row, shape)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(1 if self._recordings else _WARM_UP):
                embeddings = self._pass(static, shape)
                torch.autograd.grad(embeddings, self._parameters, torch.zeros_like(embeddings), allow_unused=True)
            del embeddings
        torch.cuda.current_stream().wait_stream(self.stream)
        # What the warm-up leaves in the allocator's cache would stand beside the graphs' own memory.
        torch.cuda.empty_cache()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with record(forward, self._pool, self.stream):
            embeddings = self._pass(static, shape)
        embeddings_grad = torch.zeros_like(embeddings)
        with record(backward, self._pool, self.stream):
            found = torch.autograd.grad(embeddings, self._parameters, embeddings_grad, allow_unused=True)
            # Added here and not after a replay: so no gradient outlives its graph, and the next one gets its memory.
            used = self.gradients.add(found)
        return _Recording(shape, static, forward, embeddings.detach(), backward, embeddings_grad, used)

    def _pass(self, row: PackedRow, shape: Shape) -> Tensor:
        # Which text a token belongs to follows from the borders, which are the smaller thing to copy for each row.
        places = torch.arange(shape.tokens, dtype=torch.int32, device=row.cu_seqlens.device)
        torch.bucketize(places, row.cu_seqlens[1:], right=True, out=row.tokens_3T[2])
        # autocast's cache of cast weights would be recorded as memory that is gone by the time of a replay.
        with torch.autocast("cuda", self._autocast, enabled=self._autocast is not None, cache_enabled=False):
            return self._embed(row, shape.max_length)


class _Replay(torch.autograd.Function):
    """Forward and backward of a recording; the parameters' gradients are added on the side, in a few kernels."""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, graphs: EncoderGraphs, recording: _Recording, ticket: _Ticket) -> Tensor:
        ctx.graphs, ctx.recording, ctx.ticket = graphs, recording, ticket
        recording.forward.replay()
        return recording.embeddings.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None]:
        if ctx.ticket is None:
            raise RuntimeError(
                "A second backward through one forward, whose states the next forward may have written over. "
                'Train with cuda_graphs="never" for that.'
            )
        recording = ctx.recording
        recording.embeddings_grad.copy_(gradient)
        ctx.graphs.gradients.collect(recording.backward.replay, recording.used)
        ctx.ticket = None
        return None, None, None, None


def _static_row(row: PackedRow, shape: Shape) -> PackedRow:
    """A row of this shape in memory that stays, beginning as the given one."""
    device = row.tokens_3T.device
    borders = shape.borders(row.lengths)
    tokens = row.tokens_3T.new_zeros(3, shape.tokens)
    tokens[:, : row.tokens_3T.shape[1]] = row.tokens_3T
    return PackedRow(
        tokens, borders.to(device), tuple(borders.diff().tolist()), row.columns, row.token_types, row.others
    )


def _copy(row: PackedRow, recording: _Recording) -> None:
    """Put a row where the graph reads. Ids and positions of an earlier row that are left behind it fill it up."""
    static, count = recording.row, row.tokens_3T.shape[1]
    static.tokens_3T[:2, :count].copy_(row.tokens_3T[:2], non_blocking=True)
    static.cu_seqlens.copy_(recording.shape.borders(row.lengths).pin_memory(), non_blocking=True)
