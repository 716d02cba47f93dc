"""What Ctrl-C and SIGTERM do to a run: the first lets it save a checkpoint, a second ends it at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The run was asked to end, and has saved what there was to save."""


class GracefulStop(TrainerCallback):
    """Ends training after the step that is under way, with a checkpoint, when a signal asks for it.

    While there is no step under way a signal raises `KeyboardInterrupt`, as Ctrl-C does in any Python program.
    """

    def __init__(self, console: Console) -> None:
        self.signal: int | None = None
        """The number of the signal that ended the run."""
        self._console = console
        self._training = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals over for a block, where a program can: in its main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        self._training = True

    def on_step_end(
        self, _args: TrainingArguments, _state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        if self.signal is not None:
            control.should_training_stop = control.should_save = True

    def on_train_end(self, *_args: Any, **_kwargs: Any) -> None:
        self._training = False

    def raise_if_asked(self) -> None:
        """Raise `Stopped` if a signal has ended the training."""
        if self.signal is not None:
            raise Stopped

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        again = self.signal is not None
        self.signal = number
        if again or not self._training:
            raise KeyboardInterrupt
        self._console.print("\nFinishing this step and saving a checkpoint; once more stops at once.", style="yellow")
