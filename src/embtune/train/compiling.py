"""The compile decision of a run: taken once, printed, stored in every checkpoint, kept on resume."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, DatasetDict
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerCallback

from embtune.accelerate.breakeven import CompileDecision, decide
from embtune.accelerate.compiling import compile_layers, has_dropout, layer_parameters, uncompile_layers
from embtune.files import read_json
from embtune.models.checkpointing import recomputes_layers
from embtune.models.families import encoder_layers
from embtune.models.modules import transformer_modules

if TYPE_CHECKING:
    from embtune.train.trainer import SentenceTransformerTrainer


# Rows that are tokenised to estimate the tokens of a step: enough for the mean, too few to be felt.
_SAMPLE = 128
# Where the data is a stream, its lengths are not known: a short query with a paragraph.
_UNKNOWN_TOKENS_PER_ROW = 160
# BERT-base, 128 pairs of nl2bash: 16.1 ms a step compiled and replayed, after 57 s; 15.1 ms fused and replayed.
_REPLAYED = "off: CUDA graphs replay the step, and its kernels are fused without compiling"


class CompileCallback(TrainerCallback, ExportableState):
    """Holds the decision, so that the Trainer stores it with its own state."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.decision: CompileDecision | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; called by the Trainer."""
        decision = self.decision.to_dict() if self.decision else None
        return {"args": {"mode": self.mode}, "attributes": {"decision": decision}}

    def on_train_begin(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_others: Any
    ) -> None:
        """The Trainer cannot save what the state it resumed from, of a plain Trainer say, has no entry for."""
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def prepare(self, trainer: "SentenceTransformerTrainer", checkpoint: Path | None, replayed: bool = False) -> None:
        """Decide, or take over a checkpoint's decision; print it; compile the encoder layers or leave them.

        Args:
            replayed: whether CUDA graphs replay the step, of kernels that are fused already.
        """
        stored = _stored(checkpoint) if self.mode == "auto" else None
        if replayed and self.mode == "auto":
            self.decision = CompileDecision(compile=False, reason=_REPLAYED, steps_left=steps_of_run(trainer))
        else:
            self.decision = stored or self._decide(trainer, steps_taken(checkpoint))
        print(f"compile: {self.decision.reason}", flush=True)
        for transformer in transformer_modules(trainer.model):
            if self.decision.compile:
                compile_layers(transformer.model)
            else:
                uncompile_layers(transformer.model)

    def _decide(self, trainer: "SentenceTransformerTrainer", taken: int) -> CompileDecision:
        steps_left = max(0, steps_of_run(trainer) - taken)
        return decide(self.mode, steps_left=steps_left, **compile_settings(trainer))


def compile_settings(trainer: "SentenceTransformerTrainer") -> dict[str, Any]:
    """The fields of `CompileEstimate` for what a trainer is about to run."""
    model = trainer.model
    backbones = [transformer.model for transformer in transformer_modules(model)]
    parameters = [parameter for backbone in backbones for parameter in backbone.parameters()]
    return {
        "device": model.device.type,
        "parameters": sum(layer_parameters(backbone) for backbone in backbones),
        "tokens_per_step": tokens_per_step(trainer),
        "trainable": "full" if all(parameter.requires_grad for parameter in parameters) else "lora",
        "checkpointing": any(recomputes_layers(backbone) for backbone in backbones),
        "dtype": model.dtype,
        "dropout": any(has_dropout(backbone) for backbone in backbones),
        "layers": sum(len(encoder_layers(backbone)) for backbone in backbones),
        "threads": torch.get_num_threads(),
    }


def steps_of_run(trainer: "SentenceTransformerTrainer") -> int:
    """Optimizer steps of the whole run, whether it was given in steps or in epochs."""
    return planned_steps(trainer.args, trainer.train_dataset)


def planned_steps(args: TrainingArguments, data: Dataset | DatasetDict) -> int:
    """Optimizer steps of a run over this data."""
    if args.max_steps > 0:
        return args.max_steps
    rows_per_batch = args.train_batch_size * args.world_size
    # A batch holds rows of one data set.
    weights = getattr(args, "dataset_weights", None) or {}
    parts = data if isinstance(data, DatasetDict) else {"": data}
    batches = sum(max(1, round(weights.get(n, 1) * math.ceil(len(rows) / rows_per_batch))) for n, rows in parts.items())
    return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))


def steps_taken(checkpoint: Path | None) -> int:
    """Optimizer steps that lie behind a checkpoint; 0 where a run begins."""
    return 0 if checkpoint is None else int(read_json(checkpoint / TRAINER_STATE_NAME)["global_step"])


def tokens_per_step(trainer: "SentenceTransformerTrainer") -> int:
    """Tokens that the encoder sees in one optimizer step on one device, estimated from the first rows."""
    args, data = trainer.args, trainer.train_dataset
    rows_per_step = args.train_batch_size * args.gradient_accumulation_steps
    part = next(iter(data.values())) if isinstance(data, DatasetDict) else data
    if not isinstance(part, Dataset):
        return rows_per_step * _UNKNOWN_TOKENS_PER_ROW
    sample = part[: min(_SAMPLE, args.train_batch_size, len(part))]
    texts = [column for column in sample.values() if column and isinstance(column[0], str)]
    tokens = sum(trainer.model.preprocess(column)["input_ids"].numel() for column in texts)
    return round(rows_per_step * tokens / max(1, len(next(iter(sample.values())))))


def _stored(checkpoint: Path | None) -> CompileDecision | None:
    if checkpoint is None:
        return None
    callbacks = read_json(checkpoint / TRAINER_STATE_NAME).get("stateful_callbacks", {})
    stored = callbacks.get(CompileCallback.__name__)
    # A decision that "never" or "always" dictated was not taken from the numbers, and does not bind "auto".
    decision = stored and stored["args"]["mode"] == "auto" and stored["attributes"].get("decision")
    return CompileDecision.from_dict(decision) if decision else None
