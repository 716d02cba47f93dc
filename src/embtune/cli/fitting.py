"""The Trainer of a run: its arguments from the options, and what is shown and noted while it runs."""

import difflib
from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, fields
from io import StringIO
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from rich.console import Console
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from embtune.cli.pacing import TimeBudget
from embtune.cli.progress import TrainingProgress
from embtune.cli.tasks import EvaluationTask
from embtune.cli.train_config import TrainConfig
from embtune.errors import ArgumentError
from embtune.evaluate.evaluator import HeldOutEvaluator
from embtune.evaluate.result import EvaluationResult
from embtune.report.callback import EventCallback, StepTimer
from embtune.report.events import EventLog
from embtune.runtime import choose_dtype
from embtune.train.arguments import SentenceTransformerTrainingArguments
from embtune.train.trainer import SentenceTransformerTrainer

ADAPTER_LEARNING_RATE = 2e-4
FULL_LEARNING_RATE = 2e-5
CHECKPOINTS_KEPT = 2
LOGGED_SHARE = 0.005  # of the steps: reading the loss after each one would make an accelerator wait


def check_trainer_options(config: TrainConfig) -> None:
    """Raise for trackers and arguments that the Trainer does not have.

    Raises:
        ArgumentError: it names them, and what is near.
    """
    for name in config.more.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            raise ArgumentError(f"report_to: there is no tracker {name!r}; there are {known}.")
        if name not in get_available_reporting_integrations():
            raise ArgumentError(f"report_to: {name} is not installed. Install it with pip, or leave it out.")
    arguments = [each.name for each in fields(SentenceTransformerTrainingArguments)]
    for name in config.more.training_args:
        if name not in arguments:
            near = difflib.get_close_matches(name, arguments, 1)
            hint = f"Did you mean {near[0]}?" if near else "See SentenceTransformerTrainingArguments."
            raise ArgumentError(f"training_args: the Trainer has no argument {name!r}. {hint}")


def make_trainer(
    config: TrainConfig,
    folder: str,
    model: SentenceTransformer,
    loss: nn.Module | Mapping[str, nn.Module],
    data: Mapping[str, Dataset],
    evaluator: "TaskEvaluator | None" = None,
    **instead: Any,
) -> SentenceTransformerTrainer:
    """The Trainer, ready to train.

    Args:
        folder: for checkpoints.
        evaluator: measures while training.
        instead: arguments of the Trainer that take the place of those the options say.
    """
    patience = config.more.early_stopping_patience if evaluator else None
    trainer = SentenceTransformerTrainer(
        model=model,
        args=training_arguments(config, folder, model, evaluator, **instead),
        train_dataset=DatasetDict(data) if len(data) > 1 else next(iter(data.values())),
        loss=dict(loss) if isinstance(loss, Mapping) else loss,
        evaluator=evaluator,
        callbacks=[EarlyStoppingCallback(patience)] if patience else [],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def training_arguments(
    config: TrainConfig, folder: str, model: SentenceTransformer, evaluator: "TaskEvaluator | None", **instead: Any
) -> SentenceTransformerTrainingArguments:
    """The Trainer's arguments; see `make_trainer`.

    Raises:
        ArgumentError: the Trainer refuses one.
    """
    more = config.more
    keeps_best = evaluator is not None and more.early_stopping_patience is not None
    save_steps = more.save_steps or (more.eval_steps if keeps_best else None)
    learning_rate = config.learning_rate or (FULL_LEARNING_RATE if config.full_finetuning else ADAPTER_LEARNING_RATE)
    compute = choose_dtype(more.dtype, model.device).dtype if model.device.type == "cuda" else torch.float32
    arguments: dict[str, Any] = {
        "output_dir": folder,
        "num_train_epochs": config.epochs or 1.0,
        "max_steps": config.max_steps or -1,
        "per_device_train_batch_size": config.batch_size,
        "learning_rate": learning_rate,
        "lr_scheduler_type": more.scheduler,
        "warmup_steps": more.warmup,
        "bf16": compute == torch.bfloat16,
        "fp16": compute == torch.float16,
        "seed": config.seed,
        "batch_sampler": more.batch_sampler,
        "prompts": dict(more.prompts) or None,
        "compile": more.compile,
        "token_cache": more.token_cache,
        "dataset_weights": dict(more.weights) or None,
        "eval_strategy": "steps" if evaluator else "no",
        "eval_steps": more.eval_steps,
        "save_strategy": "steps" if save_steps else "epoch",
        "save_steps": save_steps or 500,
        "save_total_limit": CHECKPOINTS_KEPT,
        "load_best_model_at_end": keeps_best,
        "metric_for_best_model": f"eval_{evaluator.primary_metric}" if evaluator and keeps_best else None,
        "greater_is_better": True if keeps_best else None,
        "logging_steps": LOGGED_SHARE,
        "logging_first_step": True,
        "report_to": list(more.report_to) or "none",
        "dataloader_pin_memory": model.device.type == "cuda",
        "disable_tqdm": True,
    }
    try:
        return SentenceTransformerTrainingArguments(**{**arguments, **more.training_args, **instead})
    except (TypeError, ValueError) as error:
        if isinstance(error, ArgumentError) or not more.training_args:
            raise
        raise ArgumentError(f"training_args: the Trainer refuses {dict(more.training_args)}: {error}") from error


@dataclass(frozen=True)
class TrainingFacts:
    """What a training did."""

    steps: int
    """Optimizer steps, those before a resume included."""
    seconds: float
    """Of this process alone."""
    first_loss: float | None
    """The first that was logged."""
    last_loss: float | None
    """The last one."""


def fit(
    trainer: SentenceTransformerTrainer,
    tokens_per_step: float,
    console: Console,
    log: EventLog,
    callbacks: list[TrainerCallback],
    checkpoint: str | None,
) -> TrainingFacts:
    """Train, and show and note how it goes.

    Args:
        tokens_per_step: real tokens in a batch.
        callbacks: more of them.
        checkpoint: where to go on.
    """
    length = RunLength()
    metric = f"eval_{trainer.evaluator.primary_metric}" if trainer.evaluator else None
    progress = TrainingProgress(console, length, tokens_per_step, metric)
    timer = StepTimer(log, trainer.loss.values() if isinstance(trainer.loss, dict) else [trainer.loss])
    for callback in (EventCallback(log, tokens_per_step), timer, length, progress, *callbacks):
        trainer.add_callback(callback)
    # The Trainer prints its decisions to standard output, where a quiet run shows none.
    with progress, redirect_stdout(StringIO()) if console.quiet else nullcontext():
        seconds = trainer.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    first, last = (losses[0], losses[-1]) if losses else (None, None)
    return TrainingFacts(trainer.state.global_step, seconds, first, last)


class TaskEvaluator(HeldOutEvaluator):
    """The evaluation tasks of a run; shows the results of each call. The first task tells the best model."""

    def __init__(self, tasks: Mapping[str, EvaluationTask], console: Console, log: EventLog) -> None:
        name, first = next(iter(tasks.items()))
        primary = first.main_metric if len(tasks) == 1 else f"{name}_{first.main_metric}"
        super().__init__({name: task.run for name, task in tasks.items()}, primary)
        self._console = console
        self._log = log

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        self._log.phase("Measuring while training")
        return super().__call__(model, output_path, epoch, steps)

    def seen(self, result: EvaluationResult, steps: int) -> None:
        self._console.print(f"after step {steps}: {result}")


class RunLength(TimeBudget):
    """Knows the number of steps as soon as the Trainer does, and never ends a run early."""

    def __init__(self) -> None:
        super().__init__(None, at_most=1)

    def on_train_begin(self, _args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        super().on_train_begin(*others, **kwargs)
        self.total = state.max_steps


class BeginCallback(TrainerCallback):
    """Calls a function when training begins."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        self.function()
