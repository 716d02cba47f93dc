"""What makes a run learn nothing, or little: known before its first step, from its losses, lengths and schedule."""

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CoSENTLoss,
    GISTEmbedLoss,
    GlobalOrthogonalRegularizationLoss,
    MultipleNegativesRankingLoss,
    OnlineContrastiveLoss,
)
from torch import nn
from transformers import TrainingArguments, get_scheduler

from embtune.data.columns import LABEL_ROLES
from embtune.errors import ArgumentError, PreflightWarning
from embtune.models.modules import transformer_modules
from embtune.train.accumulation import CACHED, CLASSES_IN_BATCH, PAIRS_IN_BATCH, innermost_loss, warn_about_accumulation
from embtune.train.compiling import steps_of_run

if TYPE_CHECKING:
    from embtune.train.trainer import SentenceTransformerTrainer

# Of one row all of these are constant, and their gradient is 0; AnglELoss is a CoSENTLoss.
_COMPARE_ROWS = (
    *(*CACHED, *PAIRS_IN_BATCH, *CLASSES_IN_BATCH),
    *(CoSENTLoss, OnlineContrastiveLoss, GlobalOrthogonalRegularizationLoss),
)
_READ_NEGATIVES = (*CACHED, MultipleNegativesRankingLoss, GISTEmbedLoss)
_SAMPLE = 64  # rows of each data set whose tokens are counted
_MOSTLY_CUT = 0.9


def check_run(trainer: "SentenceTransformerTrainer") -> None:
    """Warn of what would make the run learn little.

    Raises:
        ArgumentError: it could learn nothing: no batch has two rows for a loss that compares them, or no text keeps a
            token.
    """
    args, data = trainer.args, trainer.train_dataset
    parts = dict(data) if isinstance(data, Mapping) else {"": data}
    losses = trainer.loss if isinstance(trainer.loss, dict) else dict.fromkeys(parts, trainer.loss)
    warn_about_accumulation(args.gradient_accumulation_steps, trainer.loss)
    check_rows_of_batch(parts, losses, args)
    for name, part in parts.items():
        check_lengths(trainer.model, name, part, args.prompts)
    if trainer.lr_scheduler is None and (args.max_steps > 0 or isinstance(data, Dataset | DatasetDict)):
        check_learning_rates(args, steps_of_run(trainer))


def check_rows_of_batch(
    parts: Mapping[str, Dataset | IterableDataset], losses: Mapping[str, nn.Module], args: TrainingArguments
) -> None:
    """Warn of losses that compare the rows of a batch, where every batch has one row.

    Args:
        parts: each data set by its name, which is empty for a single one.
        losses: the loss of each.

    Raises:
        ArgumentError: no data set teaches anything.
    """
    alone = {}
    for name, part in parts.items():
        loss = innermost_loss(losses[name])
        rows = min(args.train_batch_size, len(part)) if isinstance(part, Dataset) else args.train_batch_size
        gathers = args.world_size > 1 and getattr(loss, "gather_across_devices", False)
        if rows == 1 and isinstance(loss, _COMPARE_ROWS) and not gathers:
            alone[name] = loss
    idle = {name: loss for name, loss in alone.items() if not _has_negatives(loss, parts[name])}
    for name, loss in alone.items():
        about = f" of the data set {name!r}" if name else ""
        learns = "is constant, and nothing is learned" if name in idle else "has the row's own negatives alone"
        finding = (
            f"Every batch{about} has one row, and {type(loss).__name__} compares the rows of a batch: it {learns}. "
            "Give more rows and a batch size of at least 2; 32 and more are usual."
        )
        if len(idle) == len(parts):
            raise ArgumentError(finding)
        warnings.warn(finding, PreflightWarning, stacklevel=3)


def _has_negatives(loss: nn.Module, part: Dataset | IterableDataset) -> bool:
    names = part.column_names or ()
    return isinstance(loss, _READ_NEGATIVES) and any(name.startswith("negative") for name in names)


def check_lengths(model: SentenceTransformer, name: str, part: Dataset | IterableDataset, prompts: Any) -> None:
    """Warn if nearly all texts of a sample are cut; streams, which can be read once, are not looked at.

    Args:
        name: of the data set, empty for a single one.
        prompts: as the trainer takes them.

    Raises:
        ArgumentError: what every text has, its prompt and special tokens, fills `max_seq_length`.
    """
    tokenizer = next((each.tokenizer for each in transformer_modules(model)), None)
    limit = model.max_seq_length
    if limit is None or not callable(tokenizer) or not isinstance(part, Dataset):
        return
    cut = texts = 0
    for column, cells in _sampled_texts(part):
        prompt = _prompt_of(prompts, name, column)
        common = len(tokenizer(prompt, verbose=False)["input_ids"])
        if common >= limit:
            what = "special tokens" if not prompt else f"special tokens and tokens of the prompt {prompt!r}"
            raise ArgumentError(
                f"max_seq_length={limit} leaves no token of any text: each has {common} {what}. Raise it; 128 to 512 "
                "are usual."
            )
        cut += sum(len(ids) > limit for ids in tokenizer([prompt + cell for cell in cells], verbose=False)["input_ids"])
        texts += len(cells)
    if texts and cut > _MOSTLY_CUT * texts:
        about = f" of the data set {name!r}" if name else ""
        warnings.warn(
            f"max_seq_length={limit} cuts {cut / texts:.0%} of the texts{about}; what stands behind is not read. Raise "
            "it, if the model can read more, or shorten the texts.",
            PreflightWarning,
            stacklevel=3,
        )


def _sampled_texts(part: Dataset) -> Iterator[tuple[str, list[str]]]:
    step = max(1, len(part) // _SAMPLE)
    rows = part.with_format(None)[: step * _SAMPLE : step]
    for column, cells in rows.items():
        if column not in LABEL_ROLES and cells and all(isinstance(cell, str) for cell in cells):
            yield column, cells


def _prompt_of(prompts: Any, name: str, column: str) -> str:
    """`prompts` is one text, or has one for a column, for a data set, or for a column of a data set."""
    while isinstance(prompts, Mapping):
        prompts = prompts.get(name, prompts.get(column))
    return prompts or ""


def check_learning_rates(args: TrainingArguments, steps: int) -> None:
    """Warn if the learning rate is 0 in every step.

    Args:
        steps: optimizer steps of the run.
    """
    warmup = args.get_warmup_steps(steps)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps, args.lr_scheduler_kwargs)
    for _ in range(steps if args.learning_rate > 0 else 0):
        if optimizer.param_groups[0]["lr"] > 0:
            return
        optimizer.step()
        scheduler.step()
    warnings.warn(
        f"The learning rate is 0 in {'the only step' if steps == 1 else f'all {steps:,} steps'} (warm-up: {warmup} of "
        f"them; learning_rate={args.learning_rate:g}), so nothing is learned. Train more steps, or set the warm-up to "
        "0 (warmup_steps=0; on the command line --warmup 0).",
        PreflightWarning,
        stacklevel=3,
    )
