"""The training itself: the Trainer's arguments from the options, and what is shown and noted while it runs."""

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from rich.console import Console
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from embtune.cli.config import TrainConfig
from embtune.cli.display import TrainingProgress
from embtune.cli.pacing import TimeBudget
from embtune.cli.run_folder import RunFolder
from embtune.cli.tasks import EvaluationTask
from embtune.report.callback import EventCallback, StepTimer
from embtune.report.events import EventLog
from embtune.report.lengths import measure_lengths
from embtune.runtime import choose_dtype
from embtune.train.arguments import SentenceTransformerTrainingArguments
from embtune.train.checkpoints import last_whole_checkpoint
from embtune.train.compiling import tokens_per_step
from embtune.train.trainer import SentenceTransformerTrainer

ADAPTER_LEARNING_RATE = 2e-4
FULL_LEARNING_RATE = 2e-5
CHECKPOINTS_KEPT = 2
LOGGED_SHARE = 0.005  # of the steps: reading the loss after each one would make an accelerator wait


def fit(
    config: TrainConfig,
    run: RunFolder,
    model: SentenceTransformer,
    loss: nn.Module,
    data: dict[str, Dataset],
    task: EvaluationTask | None,
    console: Console,
    log: EventLog,
    on_begin: Callable[[], None],
) -> dict[str, Any]:
    """Train `model` in place.

    Args:
        on_begin: called when everything has been checked and the first step is next.

    Returns:
        Steps, seconds, first and last loss, ready for JSON.
    """
    evaluated = task if config.more.eval_steps else None
    patience = config.more.early_stopping_patience
    trainer = SentenceTransformerTrainer(
        model=model,
        args=training_arguments(config, run, model, evaluated),
        train_dataset=DatasetDict(data) if len(data) > 1 else next(iter(data.values())),
        loss=loss,
        evaluator=TaskEvaluator(evaluated, console, log) if evaluated else None,
        callbacks=[EarlyStoppingCallback(patience)] if patience else [],
    )
    trainer.remove_callback(PrinterCallback)
    length = RunLength()
    lengths = measure_lengths(model, data, config.batch_size, config.more.prompts)
    if lengths is not None:
        log.write("lengths", **lengths)
    tokens = config.batch_size * lengths["tokens_per_row"] if lengths else tokens_per_step(trainer)
    progress = TrainingProgress(console, length, tokens)
    timer = StepTimer(log, trainer.loss.values() if isinstance(trainer.loss, dict) else [trainer.loss])
    for callback in (BeginCallback(on_begin), EventCallback(log, tokens), timer, length, progress):
        trainer.add_callback(callback)
    checkpoint = str(last_whole_checkpoint(run.checkpoints)) if config.resume else None
    with progress:
        seconds = trainer.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
    }


def training_arguments(
    config: TrainConfig, run: RunFolder, model: SentenceTransformer, evaluated: EvaluationTask | None
) -> SentenceTransformerTrainingArguments:
    """The Trainer's arguments; `evaluated` is what is measured while training."""
    more = config.more
    keeps_best = evaluated is not None and more.early_stopping_patience is not None
    save_steps = more.save_steps or (more.eval_steps if keeps_best else None)
    learning_rate = config.learning_rate or (FULL_LEARNING_RATE if config.full_finetuning else ADAPTER_LEARNING_RATE)
    compute = choose_dtype(more.dtype, model.device).dtype if model.device.type == "cuda" else torch.float32
    return SentenceTransformerTrainingArguments(
        output_dir=str(run.checkpoints),
        num_train_epochs=config.epochs or 1.0,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type=more.scheduler,
        warmup_steps=more.warmup,
        bf16=compute == torch.bfloat16,
        fp16=compute == torch.float16,
        seed=config.seed,
        batch_sampler=more.batch_sampler,
        prompts=dict(more.prompts) or None,
        compile=more.compile,
        token_cache=more.token_cache,
        eval_strategy="steps" if evaluated else "no",
        eval_steps=more.eval_steps,
        save_strategy="steps" if save_steps else "epoch",
        save_steps=save_steps or 500,
        save_total_limit=CHECKPOINTS_KEPT,
        load_best_model_at_end=keeps_best,
        metric_for_best_model=f"eval_{evaluated.main_metric}" if evaluated and keeps_best else None,
        greater_is_better=True if keeps_best else None,
        logging_steps=LOGGED_SHARE,
        logging_first_step=True,
        report_to=list(more.report_to) or "none",
        disable_tqdm=True,
    )


class TaskEvaluator(SentenceEvaluator):
    """An evaluation task in the form that the Trainer calls; shows the result of each call."""

    def __init__(self, task: EvaluationTask, console: Console, log: EventLog) -> None:
        super().__init__()
        self.log = log
        self.task = task
        self.console = console
        self.primary_metric = task.main_metric

    def __call__(
        self,
        model: SentenceTransformer,
        output_path: str | None = None,  # noqa: ARG002 (the Trainer gives it by name)
        epoch: float = -1,
        steps: int = -1,
    ) -> dict[str, float]:
        self.log.phase("Measuring while training")
        result = self.task.run(model)
        self.console.print(f"after step {steps}: {result}")
        self.store_metrics_in_model_card_data(model, result.metrics, epoch, steps)
        return dict(result.metrics)


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
