"""Making a training run end on time: the number of steps follows from how long steps take on this machine."""

import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

WARMUP_STEPS = 3


class TimeBudget(TrainerCallback):
    """Stop training so that it ends within `seconds`, with a learning rate that falls to zero just then.

    After every step the number of steps that still fit is estimated anew from the mean time of the steps so far, so a
    machine that slows down runs fewer of them instead of being late. The first step warms caches up and counts only
    until there is a second one.

    Args:
        seconds: from now to the end of the last step; None takes exactly `at_most` steps, however long they take.
        at_most: largest number of steps.
    """

    def __init__(self, seconds: float | None, at_most: int) -> None:
        self.deadline = None if seconds is None else time.perf_counter() + seconds
        self.total = at_most
        """Steps of the whole run, as far as is known now."""
        self.seconds_per_step = 0.0
        """Mean over the steps so far; 0 before the first."""
        self._at_most = at_most
        self._ends: list[float] = []

    def scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        """A short linear warm-up times a linear decay to zero at `total`, whatever `total` is at that moment."""
        return torch.optim.lr_scheduler.LambdaLR(optimizer, self.learning_rate_factor)

    def learning_rate_factor(self, step: int) -> float:
        """Share of the peak learning rate for the step after `step` finished ones, between 0 and 1."""
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        return warmup * max(0.0, 1 - step / self.total)

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        self._ends = [time.perf_counter()]

    def on_step_end(
        self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        self._ends.append(time.perf_counter())
        start = 0 if len(self._ends) == 2 else 1
        self.seconds_per_step = (self._ends[-1] - self._ends[start]) / (len(self._ends) - 1 - start)
        if self.deadline is not None:
            fitting = int(max(0.0, self.deadline - self._ends[-1]) / self.seconds_per_step)
            self.total = min(self._at_most, state.global_step + fitting)
        if state.global_step >= self.total:
            control.should_training_stop = True
