"""sentence-transformers' trainer with checked data, exact checkpoints and a compile decision; all else is inherited."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import sentence_transformers
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers.trainer_utils import TrainOutput

from embtune.data.checks import check_training_data, warn_about_accumulation
from embtune.data.columns import canonical
from embtune.errors import ArgumentError
from embtune.losses.one_pass import takes_one_pass
from embtune.packing.columns import embed_columns_once
from embtune.train.arguments import SentenceTransformerTrainingArguments
from embtune.train.checkpoints import is_whole, last_whole_checkpoint, restore_weights
from embtune.train.compiling import CompileCallback
from embtune.train.reach import refuse_unreachable

AnyDataset: TypeAlias = Dataset | IterableDataset
Datasets: TypeAlias = AnyDataset | DatasetDict | Mapping[str, AnyDataset] | None


class SentenceTransformerTrainer(sentence_transformers.SentenceTransformerTrainer):
    """Trains any SentenceTransformer with any sentence-transformers loss; arguments as there.

    On top of it: columns are known by role, never by order; a model whose adapter its forward does not reach is
    refused; a checkpoint is put back exactly, quantised bases included, or the run stops; a checkpoint cut off by a
    crash is passed over; and the encoder layers are compiled where that pays.

    Raises:
        ArgumentError, DataError, ModelError: see the message; nothing has been trained then.
    """

    def __init__(
        self,
        model: SentenceTransformer | None = None,
        args: sentence_transformers.SentenceTransformerTrainingArguments | None = None,
        train_dataset: Datasets = None,
        eval_dataset: Datasets = None,
        loss: nn.Module | Mapping[str, nn.Module] | Any = None,
        **others: Any,
    ) -> None:
        args = SentenceTransformerTrainingArguments("tmp_trainer") if args is None else args
        columns = getattr(args, "columns", None)
        if columns and isinstance(args.prompts, dict):
            # Prompts may be keyed by the data's own column names, which are roles from here on.
            args.prompts = {columns.get(name, name): prompt for name, prompt in args.prompts.items()}
        train_dataset = _with_roles(train_dataset, columns, "train_dataset")
        eval_dataset = _with_roles(eval_dataset, columns, "eval_dataset")
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, loss=loss, **others
        )
        self._embed: nn.Module | None = None
        self._compile_callback = CompileCallback(getattr(args, "compile", "auto"))
        self.add_callback(self._compile_callback)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; `resume_from_checkpoint=True` goes on from the newest whole checkpoint of the output folder."""
        checkpoint = self._checkpoint(resume_from_checkpoint)
        if self.model is not None:
            refuse_unreachable(self.model)
            self._remember_prompts(self.model)
        self._check_data()
        self._compile_callback.prepare(self, checkpoint)
        return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, Any]]:
        """The loss of a batch; on the packed engine all columns are embedded in one pass where the loss allows it."""
        loss = self.loss[inputs["dataset_name"]] if isinstance(self.loss, dict) else self.loss
        self._embed = model if getattr(self.model, "packs", False) and takes_one_pass(loss) else None
        return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)

    def collect_features(self, inputs: dict[str, Any]) -> tuple[list[dict[str, Any]], torch.Tensor | None]:
        """The features of each column, with their embeddings where `compute_loss` found that one pass will do."""
        columns, labels = super().collect_features(inputs)
        return (columns if self._embed is None else embed_columns_once(self._embed, columns)), labels

    def _checkpoint(self, resume: str | bool | None) -> Path | None:
        if not resume:
            return None
        if resume is True:
            return last_whole_checkpoint(Path(self.args.output_dir))
        checkpoint = Path(resume)
        if not is_whole(checkpoint):
            raise ArgumentError(f"resume_from_checkpoint: {checkpoint} is no whole checkpoint of a Trainer.")
        return checkpoint

    def _check_data(self) -> None:
        """Look for what spoils a run; in-memory data only, since a stream can be read once."""
        if isinstance(self.train_dataset, Dataset):
            evaluation = self.eval_dataset if isinstance(self.eval_dataset, Dataset) else None
            check_training_data(self.train_dataset, evaluation, batch_size=self.args.train_batch_size)
        losses = list(self.loss.values()) if isinstance(self.loss, dict) else [self.loss]
        for loss in losses:
            warn_about_accumulation(self.args.gradient_accumulation_steps, loss)

    def _remember_prompts(self, model: SentenceTransformer) -> None:
        """Give the model the prompts it is trained with, where it has none: whoever loads it needs them to search."""
        prompts = self.args.prompts
        if not isinstance(prompts, dict) or any(isinstance(value, dict) for value in prompts.values()):
            return
        for role, name in (("anchor", "query"), ("positive", "document")):
            if prompts.get(role) and not model.prompts.get(name):
                model.prompts[name] = prompts[role]

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        model = getattr(self.model, "_orig_mod", self.model)
        restore_weights(model, Path(checkpoint_path))

    def _load_best_model(self) -> None:
        # sentence-transformers logs a failure here and keeps the last weights; here it is raised.
        checkpoint = self.state.best_model_checkpoint
        self._load_from_checkpoint(checkpoint)
        self.model.model_card_data.set_best_model_step(int(checkpoint.rpartition("-")[2]))


def _with_roles(datasets: Datasets, columns: Mapping[str, str] | None, source: str) -> Datasets:
    if datasets is None:
        return None
    if isinstance(datasets, Mapping):
        named = {name: canonical(data, columns, source=f"{source}[{name!r}]") for name, data in datasets.items()}
        return DatasetDict(named)
    return canonical(datasets, columns, source=source)
