"""One training run on pairs, shown while it happens, that takes a number of steps or ends on time."""

import tempfile
import time
from dataclasses import dataclass

import torch
from datasets import Dataset
from rich.console import Console
from sentence_transformers import SentenceTransformer
from transformers import PrinterCallback

from embtune.cli.pacing import TimeBudget
from embtune.cli.progress import TrainingProgress
from embtune.losses import MultipleNegativesRankingLoss  # type: ignore[attr-defined]
from embtune.report.callback import EventCallback, StepTimer
from embtune.report.events import EventLog
from embtune.report.lengths import measure_lengths
from embtune.train.arguments import SentenceTransformerTrainingArguments
from embtune.train.trainer import SentenceTransformerTrainer

MAX_EPOCHS = 3  # a fast accelerator could read the pairs a hundred times in six minutes, and learn them by heart


@dataclass(frozen=True)
class TrainingFacts:
    """What a training run did."""

    steps: int
    """Optimizer steps."""
    seconds: float
    """Wall time, set-up included."""
    tokens_per_second: float
    """Real tokens, padding left out, over the steps after the first."""
    first_loss: float
    """Loss of the first batch."""
    last_loss: float
    """Loss of the last batch."""


def train_within(
    model: SentenceTransformer,
    rows: list[tuple[str, str]],
    *,
    seconds: float,
    steps: int | None,
    batch_size: int,
    learning_rate: float,
    seed: int,
    console: Console,
    log: EventLog,
) -> TrainingFacts:
    """Train `model` on (anchor, positive) rows with in-batch negatives.

    Args:
        seconds: time for it; as many steps as fit are taken, at most three epochs.
        steps: exact number of steps, which makes `seconds` irrelevant.
        batch_size: pairs in a batch; all rows where there are fewer.
        log: gets the run's events.
    """
    batch_size = min(batch_size, len(rows))
    budget = TimeBudget(seconds, MAX_EPOCHS * -(-len(rows) // batch_size)) if steps is None else TimeBudget(None, steps)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=learning_rate)
    data = Dataset.from_dict({"anchor": [a for a, _ in rows], "positive": [p for _, p in rows]})
    lengths = measure_lengths(model, {"pairs": data}, batch_size)
    assert lengths is not None, "a model with LoRA reads tokens"
    log.write("lengths", **lengths)
    tokens_per_step = batch_size * lengths["tokens_per_row"]
    progress = TrainingProgress(console, budget, tokens_per_step)
    loss = MultipleNegativesRankingLoss(model)
    events = EventCallback(log, tokens_per_step, total=lambda: budget.total)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=scratch,
                max_steps=budget.total,
                per_device_train_batch_size=batch_size,
                learning_rate=learning_rate,
                seed=seed,
                # The decision to compile counts the steps that are left, which a timed run does not know.
                compile="never" if steps is None else "auto",
                logging_steps=1,
                save_strategy="no",
                dataloader_pin_memory=model.device.type == "cuda",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=data,
            loss=loss,
            callbacks=[budget, progress, events, StepTimer(log, [loss])],
            optimizers=(optimizer, budget.scheduler(optimizer)),
        )
        trainer.remove_callback(PrinterCallback)
        with progress:
            trainer.train()
    return TrainingFacts(
        steps=len(progress.losses),
        seconds=time.perf_counter() - start,
        tokens_per_second=tokens_per_step / budget.seconds_per_step,
        first_loss=progress.losses[0],
        last_loss=progress.losses[-1],
    )
