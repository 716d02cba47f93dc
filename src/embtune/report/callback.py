"""Callbacks of the Trainer that write a run's event file: what is logged, and where the time of a step goes."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from embtune.report.events import EventLog
from embtune.runtime import peak_memory

HEARTBEAT = 5.0  # seconds without another event after which a step is noted, so that readers know the run is alive
_NOT_METRICS = ("runtime", "per_second", "epoch", "model_preparation_time")


class EventCallback(TrainerCallback):
    """Writes steps, losses, evaluations and checkpoints.

    Args:
        log: where to.
        tokens_per_step: mean number of real tokens in an optimizer step; None leaves tokens per second out.
        total: number of steps of the run as known now; None takes the Trainer's.
    """

    def __init__(
        self, log: EventLog, tokens_per_step: float | None = None, total: Callable[[], int] | None = None
    ) -> None:
        self._log = log
        self._tokens_per_step = tokens_per_step
        self._total = total
        self._mark = 0.0
        self._seconds = 0.0  # of steps since the last log, without the time of logs, evaluations and saves
        self._steps = 0
        self._written = 0.0

    def on_train_begin(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_others: Any
    ) -> None:
        self._write(state, "training")
        self._restart()

    def on_step_end(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_others: Any
    ) -> None:
        now = time.perf_counter()
        self._seconds += now - self._mark
        self._steps += 1
        self._mark = now
        if now - self._written >= HEARTBEAT:
            self._write(state, "step")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_others: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        fields = {name: logs[name] for name in ("loss", "learning_rate", "grad_norm", "epoch") if name in logs}
        if self._tokens_per_step is not None and self._seconds > 0:
            fields["tokens_per_second"] = self._tokens_per_step * self._steps / self._seconds
        self._write(state, "log", **fields, memory=peak_memory(args.device))
        self._restart()

    def on_evaluate(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **_others: Any,
    ) -> None:
        found = {
            name.removeprefix("eval_"): value
            for name, value in (metrics or {}).items()
            if isinstance(value, int | float) and not name.endswith(_NOT_METRICS)
        }
        self._write(state, "evaluation", metrics=found)
        self._mark = time.perf_counter()

    def on_save(self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_others: Any) -> None:
        self._write(state, "checkpoint")
        self._mark = time.perf_counter()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_others: Any
    ) -> None:
        self._write(state, "trained", memory=peak_memory(args.device))

    def _restart(self) -> None:
        self._seconds, self._steps, self._mark = 0.0, 0, time.perf_counter()

    def _write(self, state: TrainerState, event: str, **fields: Any) -> None:
        if state.is_world_process_zero:
            steps = self._total() if self._total else state.max_steps
            self._log.write(event, step=state.global_step, steps=steps, **fields)
        self._written = time.perf_counter()


class StepTimer(TrainerCallback):
    """Measures where the time of a few early steps goes, writes one `step_time` event, and is gone.

    `data` is the wait for the batch; `forward` ends with the loss; `backward` ends with clipped gradients; `optimizer`
    is the update and the schedule. On an accelerator the measured steps wait for the device at each of these ends.
    Cached losses run the model a second time in what is counted as `backward`.

    Args:
        log: where to.
        losses: the modules whose forward gives the loss of a batch.
        warm_up: steps that are not measured.
        steps: steps that are.
    """

    def __init__(self, log: EventLog, losses: Iterable[nn.Module], warm_up: int = 2, steps: int = 8) -> None:
        self._log = log
        self._losses = list(losses)
        self._left_out = warm_up
        self._steps = steps
        self._measured = 0
        self._mark = 0.0
        self._seconds: dict[str, float] = {}
        self._hooks: list[RemovableHandle] = []
        self._device = torch.device("cpu")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_others: Any
    ) -> None:
        if state.is_world_process_zero:
            self._device = args.device
            self._hooks = [loss.register_forward_hook(lambda *_: self._lap("forward")) for loss in self._losses]

    def on_step_begin(self, *_args: Any, **_others: Any) -> None:
        self._lap("data")

    def on_substep_end(self, *_args: Any, **_others: Any) -> None:
        self._lap("backward")

    def on_pre_optimizer_step(self, *_args: Any, **_others: Any) -> None:
        self._lap("backward")

    def on_step_end(self, *_args: Any, **_others: Any) -> None:
        self._lap("optimizer")
        if not self._hooks:
            return
        if self._left_out:
            self._left_out -= 1
            self._seconds = {}
        else:
            self._measured += 1
            if self._measured == self._steps:
                self._finish()

    def on_log(self, *_args: Any, **_others: Any) -> None:
        self._mark = time.perf_counter()

    on_evaluate = on_save = on_log

    def on_train_end(self, *_args: Any, **_others: Any) -> None:
        self._finish()

    def _lap(self, part: str) -> None:
        if not self._hooks:
            return
        # A recording of the step must not be waited for; its replays call no hook.
        if self._device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._mark:
            self._seconds[part] = self._seconds.get(part, 0.0) + now - self._mark
        self._mark = now

    def _finish(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._measured:
            seconds = {part: value / self._measured for part, value in self._seconds.items()}
            if "forward" not in seconds:  # a step that is replayed as one piece
                seconds["forward and backward"] = seconds.pop("backward", 0.0)
            self._log.write("step_time", seconds=seconds, steps=self._measured)
            self._measured = 0
