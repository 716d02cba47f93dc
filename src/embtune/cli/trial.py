"""A few real steps with a learning rate of zero: what a step takes here, and whether it fits into the memory."""

import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import TrainerCallback

from embtune.cli.fitting import make_trainer
from embtune.cli.train_config import TrainConfig
from embtune.errors import PreflightWarning
from embtune.runtime import peak_memory

STEPS = 4  # the first warms up and is not counted


def timed_steps(
    config: TrainConfig,
    model: SentenceTransformer,
    loss: nn.Module | Mapping[str, nn.Module],
    data: Mapping[str, Dataset],
) -> tuple[float, int | None]:
    """Take a few steps on random rows, uncompiled; no weight changes, and nothing is written.

    Returns:
        Seconds of a step, tokenising included, and the most bytes held at once, where the system tells.
    """
    clock = _Clock()
    rows = {
        name: part.shuffle(seed=config.seed).select(range(min(len(part), STEPS * config.batch_size)))
        for name, part in data.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            config,
            folder,
            model,
            loss,
            rows,
            max_steps=STEPS,
            learning_rate=0.0,
            save_strategy="no",
            logging_strategy="no",
            compile="never",
            token_cache=False,
            dataset_weights=None,
            report_to="none",
        )
        trainer.add_callback(clock)
        # What the Trainer prints and finds out is about this trial; the run itself has been checked.
        with redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", PreflightWarning)
            trainer.train()
    return statistics.median(clock.seconds[1:]), peak_memory(trainer.args.device)


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._mark = 0.0

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        self._mark = time.perf_counter()

    def on_step_end(self, args: Any, *_args: Any, **_kwargs: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        now = time.perf_counter()
        self.seconds.append(now - self._mark)
        self._mark = now
