"""sentence-transformers' trainer with checked data, exact checkpoints and a compile decision; all else is inherited."""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import sentence_transformers
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from sentence_transformers import SentenceTransformer
from torch import nn
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader
from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

from embtune.accelerate.graphs import EncoderGraphs
from embtune.accelerate.loss_graphs import LossGraphs
from embtune.data.checks import check_training_data
from embtune.data.columns import canonical
from embtune.errors import ArgumentError, EmbtuneWarning
from embtune.losses.repeatable import settings_of
from embtune.losses.services import fall_back_for, takes_one_pass
from embtune.packing.columns import embed_columns_once, embed_row_once
from embtune.packing.row import PREPARED
from embtune.train.arguments import SentenceTransformerTrainingArguments
from embtune.train.checkpoint_folders import TRAINER_STATE_NAME, is_whole, last_whole_checkpoint
from embtune.train.checkpoints import restore_loss_weights, restore_weights, save_loss_weights
from embtune.train.compiling import CompileCallback, steps_of_run, steps_taken
from embtune.train.graphed import GraphedModel, encoder_graphs, loss_graphs, settle_row_sizes
from embtune.train.kernels import leave_mark, settle_kernels
from embtune.train.precision import settle_casting, settle_float16
from embtune.train.prompts import remember_prompts
from embtune.train.reach import refuse_unreachable
from embtune.train.run_checks import check_run
from embtune.train.sampling import WeightedBatchSampler, check_weights
from embtune.train.token_loaders import TokenLoaders, unread_features

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
            # Prompts may be keyed by the data's own column names, which are roles from here on; not so for another
            # trainer that is given the same arguments.
            args = copy.copy(args)
            args.prompts = {columns.get(name, name): prompt for name, prompt in args.prompts.items()}
        train_dataset = _with_roles(train_dataset, columns, "train_dataset")
        eval_dataset = _with_roles(eval_dataset, columns, "eval_dataset")
        if train_dataset is not None:
            check_weights(getattr(args, "dataset_weights", None), train_dataset)
        self._kernels_mark: Path | None = None
        if model is not None and train_dataset is not None:
            settle_float16(model, args)
            self._kernels_mark = settle_kernels(model, args, train_dataset)
            settle_casting(model, args)
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, loss=loss, **others
        )
        self._embed: Callable[[dict[str, Any]], dict[str, Any]] | None = None
        self._graphs: EncoderGraphs | None = None
        self._loss_graphs: LossGraphs | None = None
        self._kind_of_loader = ""
        self._token_loaders = TokenLoaders(self, enabled=getattr(args, "token_cache", True))
        self._compile_callback = CompileCallback(getattr(args, "compile", "auto"))
        self.add_callback(self._compile_callback)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; `resume_from_checkpoint=True` goes on from the newest whole checkpoint of the output folder."""
        checkpoint = self._checkpoint(resume_from_checkpoint)
        if self.model is not None:
            refuse_unreachable(self.model)
            _warn_of_fallback(self.model)
            remember_prompts(self.model, self.args.prompts)
            self.model.model_card_data.add_tags("embtune")
        self._check_data()
        self._graphs = encoder_graphs(self)
        self._loss_graphs = None if self._graphs is None else loss_graphs(self._graphs)
        self._compile_callback.prepare(self, checkpoint, replayed=self._graphs is not None)
        if checkpoint is not None and 0 < self.args.max_steps <= steps_taken(checkpoint):
            return self._take_over(checkpoint)
        kept = nullcontext() if self._graphs is None else self.model.fixed_structure()
        try:
            with kept:
                output = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
            if self._kernels_mark is not None:
                leave_mark(self._kernels_mark)
            return output
        finally:
            self._graphs = self._loss_graphs = None  # and with them their memory

    def _take_over(self, checkpoint: Path) -> TrainOutput:
        """Put back a run that has no step left, without training; the Trainer would take one step more."""
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            self._load_best_model()
        else:
            self._load_from_checkpoint(str(checkpoint))
        return TrainOutput(self.state.global_step, float("nan"), {"train_runtime": 0.0})

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, Any]]:
        """The loss of a batch; on the packed engine all columns are embedded in one pass where the loss allows it."""
        loss = self.loss[inputs["dataset_name"]] if isinstance(self.loss, dict) else self.loss
        self._embed = None
        if getattr(self.model, "packs", False) and takes_one_pass(loss):
            self._embed = model if self._graphs is None else GraphedModel(model, self._graphs)
        if self._loss_graphs is not None and PREPARED in inputs and not return_outputs:
            settings = settings_of(loss)
            if settings is not None:
                return self._loss_graphs(loss, settings, *self.collect_features(inputs))
        return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)

    def collect_features(self, inputs: dict[str, Any]) -> tuple[list[dict[str, Any]], torch.Tensor | None]:
        """The features of each column, with their embeddings where `compute_loss` found that one pass will do."""
        if PREPARED in inputs:
            return embed_row_once(self._embed or self.model, inputs[PREPARED]), inputs.get("label")
        columns, labels = super().collect_features(inputs)
        if self._embed is None:
            return columns, labels
        unread = unread_features(self.model)
        columns = [{key: value for key, value in column.items() if key not in unread} for column in columns]
        return embed_columns_once(self._embed, columns), labels

    def get_multi_dataset_batch_sampler(
        self,
        dataset: ConcatDataset,
        batch_samplers: list[BatchSampler],
        generator: torch.Generator | None = None,
        seed: int | None = 0,
    ) -> BatchSampler:
        """As sentence-transformers', or by `dataset_weights` where those are given."""
        weights = getattr(self.args, "dataset_weights", None)
        if not weights or self._kind_of_loader != "train":
            return super().get_multi_dataset_batch_sampler(dataset, batch_samplers, generator, seed)
        shares = [weights.get(name, 1.0) for name in self.train_dataset]
        return WeightedBatchSampler(dataset, batch_samplers, shares, generator, seed)

    def _build_dataloader(self, dataset: Any, batch_size: int, dataset_kind: str) -> DataLoader:
        """As sentence-transformers makes it, with texts that are token ids already where that gives the same."""
        if getattr(self.model, "packs", False):
            fall_back_for(self.losses, self.model)
        self._kind_of_loader = dataset_kind
        loader = super()._build_dataloader(dataset, batch_size, dataset_kind)
        with self.args.main_process_first(desc="tokenising"):
            loader, how = self._token_loaders.serve(loader, dataset)
        if dataset_kind == "train" and self.is_world_process_zero():
            print(f"token ids: {how}", flush=True)
        if dataset_kind == "train" and self._graphs is not None:
            settle_row_sizes(self._graphs, loader.dataset, batch_size, steps_of_run(self))
        return loader

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; a checkpoint (which the Trainer saves by an internal call) has the loss' weights too."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and self.args.should_save:
            save_loss_weights(self._loss_module(), self.model, Path(output_dir))

    @property
    def losses(self) -> list[nn.Module]:
        """The loss, or those of all data sets."""
        return list(self.loss.values()) if isinstance(self.loss, dict) else [self.loss]

    def _loss_module(self) -> nn.Module:
        return nn.Sequential(OrderedDict(self.loss)) if isinstance(self.loss, dict) else self.loss

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
        """Look for what spoils a run; rows in memory only, since a stream can be read once."""
        if isinstance(self.train_dataset, Dataset | DatasetDict):
            evaluation = self.eval_dataset if isinstance(self.eval_dataset, Dataset | DatasetDict) else None
            check_training_data(self.train_dataset, evaluation, batch_size=self.args.train_batch_size)
        check_run(self)

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        model = getattr(self.model, "_orig_mod", self.model)
        restore_weights(model, Path(checkpoint_path))
        restore_loss_weights(self._loss_module(), model, Path(checkpoint_path))

    def _load_best_model(self) -> None:
        # sentence-transformers logs a failure here and keeps the last weights; here it is raised.
        checkpoint = self.state.best_model_checkpoint
        self._load_from_checkpoint(checkpoint)
        self.model.model_card_data.set_best_model_step(int(checkpoint.rpartition("-")[2]))


def _warn_of_fallback(model: SentenceTransformer) -> None:
    engine = getattr(model, "engine", None)
    why = engine.fallback(model) if engine is not None else None
    if why is not None:
        warnings.warn(f"The packed engine is off: {why}.", EmbtuneWarning, stacklevel=3)


def _with_roles(datasets: Datasets, columns: Mapping[str, str] | None, source: str) -> Datasets:
    if datasets is None:
        return None
    if isinstance(datasets, Mapping):
        named = {name: canonical(data, columns, source=f"{source}[{name!r}]") for name, data in datasets.items()}
        return DatasetDict(named)
    return canonical(datasets, columns, source=source)
