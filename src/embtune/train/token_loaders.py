"""Whether a run's texts are tokenised once or in each batch, and the data loaders that follow from it."""

import functools
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import datasets
import torch
from datasets import DatasetDict, IterableDataset, Value
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.data_collator import BaseDataCollator
from sentence_transformers.base.trainer import BaseTrainer
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch.utils.data import ConcatDataset, DataLoader

from embtune.data.token_cache import TokenCache
from embtune.data.tokenise import ColumnTokeniser, why_not_tokenised
from embtune.losses.services import takes_one_pass
from embtune.models.modules import pooling_modules
from embtune.train.collator import TENSORS, Padding, RowLayout, TokenCollator, TokenRows

if TYPE_CHECKING:
    from embtune.train.trainer import SentenceTransformerTrainer

# Rows of each data set that are also tokenised in the ordinary way, and compared.
_SAMPLE = 8
_STRINGS = (Value("string"), Value("large_string"))
_MORE = "this model's batches hold more than the token ids of their texts"


class _TextsStay(Exception):
    """Why texts have to be tokenised in each batch."""


@dataclass
class _Part:
    """One data set, tokenised."""

    rows: TokenRows
    sample: list[dict[str, Any]]
    """Its first rows, as texts."""
    dataset_name: str | None
    features: dict[str | None, dict[str, Any]]
    """As `Padding.features`."""


class TokenLoaders:
    """Gives a trainer's data loaders rows of token ids; what they draw, and in which order, stays the same.

    Args:
        trainer: its data collator, model and loss are looked at when a loader is made.
        enabled: the argument `token_cache`.
    """

    def __init__(self, trainer: "SentenceTransformerTrainer", enabled: bool) -> None:
        self._trainer = trainer
        self._enabled = enabled
        self._tokeniser: ColumnTokeniser | None = None

    def serve(self, loader: DataLoader, dataset: Any) -> tuple[DataLoader, str]:
        """The loader to use in the place of one that reads texts, and how its token ids come about.

        Args:
            loader: as sentence-transformers makes it.
            dataset: what it was made for.
        """
        start = time.perf_counter()
        try:
            tokeniser = self._tokeniser_for(dataset)
            rows, collator = self._prepare(dataset, tokeniser)
        except _TextsStay as reason:
            return loader, f"made in each batch, because {reason}"
        served = DataLoader(
            rows,
            batch_sampler=loader.batch_sampler,
            collate_fn=collator,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            persistent_workers=loader.persistent_workers,
            prefetch_factor=loader.prefetch_factor,
        )
        return served, tokeniser.summary(time.perf_counter() - start)

    def _prepare(self, dataset: Any, tokeniser: ColumnTokeniser) -> tuple[ConcatDataset | TokenRows, TokenCollator]:
        collator = self._trainer.data_collator
        several = isinstance(dataset, DatasetDict)
        parts = [_tokenised(part, collator, tokeniser) for part in (dataset.values() if several else [dataset])]
        padding = Padding(
            padding_id=tokeniser.model.tokenizer.pad_token_id,
            left=tokeniser.model.tokenizer.padding_side == "left",
            features={prompt: features for part in parts for prompt, features in part.features.items()},
        )
        made = TokenCollator(collator, padding, self._layout(padding, parts))
        for part in parts:
            ids = part.rows.__getitems__(list(range(len(part.sample))))
            if not _equal(made.padded(ids), collator(part.sample)):
                raise _TextsStay(_MORE)
        return (ConcatDataset([part.rows for part in parts]) if several else parts[0].rows), made

    def _tokeniser_for(self, dataset: Any) -> ColumnTokeniser:
        collator = self._trainer.data_collator
        if not self._enabled:
            raise _TextsStay("token_cache=False")
        if isinstance(dataset, IterableDataset):
            raise _TextsStay("the data is a stream")
        if isinstance(dataset, DatasetDict) and callable(self._trainer.args.multi_dataset_batch_sampler):
            raise _TextsStay("multi_dataset_batch_sampler may mix data sets")
        model = getattr(collator.preprocess_fn, "__self__", None)
        if type(collator) is not SentenceTransformerDataCollator or not isinstance(model, SentenceTransformer):
            raise _TextsStay("the data collator is not the usual one")
        if obstacle := why_not_tokenised(model):
            raise _TextsStay(obstacle)
        if self._tokeniser is None or self._tokeniser.model is not model:
            self._tokeniser = ColumnTokeniser(model, TokenCache.default(), say=functools.partial(print, flush=True))
        return self._tokeniser

    def _layout(self, padding: Padding, parts: Iterable[_Part]) -> RowLayout | None:
        trainer = self._trainer
        names = {part.dataset_name for part in parts}
        losses = trainer.loss if isinstance(trainer.loss, dict) else dict.fromkeys(names, trainer.loss)
        # DataParallel would hand the whole row to each of its devices.
        if not getattr(trainer.model, "packs", False) or trainer.args.n_gpu > 1:
            return None
        return RowLayout(
            padding_id=trainer.model.engine.padding_id,
            token_types=any("token_type_ids" in features for features in padding.features.values()),
            ignored=unread_features(trainer.model),
            datasets=frozenset(name for name in names if name in losses and takes_one_pass(losses[name])),
        )


def _tokenised(dataset: datasets.Dataset, collator: BaseDataCollator, tokeniser: ColumnTokeniser) -> _Part:
    dataset_name = _added_name(dataset)
    sample = dataset.__getitems__(list(range(min(_SAMPLE, len(dataset)))))
    if not sample:
        raise _TextsStay("there are no rows")
    plain = dataset.with_format(None)
    features, texts = {}, {}
    for name, asked in _asked(collator, sample).items():
        if dataset.features[name] not in _STRINGS:
            raise _TextsStay(f"column {name!r} holds more than text")
        if asked.get("task") is not None:
            raise _TextsStay("router_mapping gives columns a task")
        made = collator.preprocess_fn([row[name] for row in sample], **asked)
        if not {key for key, value in made.items() if isinstance(value, torch.Tensor)} <= TENSORS:
            raise _TextsStay(_MORE)
        features[asked.get("prompt")] = dict(made)
        texts[name] = tokeniser(plain.select_columns([name]), asked)
    names = list(sample[0])
    rest = [name for name in names if name not in texts and name in plain.column_names]
    rows = TokenRows(names, texts, plain.select_columns(rest) if rest else None, dataset_name)
    return _Part(rows, sample, dataset_name, features)


def unread_features(model: SentenceTransformer) -> frozenset[str]:
    """Features that may differ between columns which share a pass: the length of a prompt, where it is pooled too."""
    own = all(type(module).__module__.startswith("sentence_transformers.") for module in model)
    pooled = all(pooling.include_prompt for pooling in pooling_modules(model))
    return frozenset({"prompt_length"}) if own and pooled else frozenset()


def _added_name(dataset: datasets.Dataset) -> str | None:
    """The data set's name, if sentence-transformers adds it to each row; any other transform may change the texts."""
    if dataset.format["type"] is None:
        return None
    transform = dataset.format["format_kwargs"].get("transform")
    added = isinstance(transform, functools.partial) and transform.func is BaseTrainer.add_dataset_name_transform
    if not added or transform.keywords.get("transform") is not None:
        raise _TextsStay("rows pass through a format or transform of the data set")
    return str(transform.keywords["dataset_name"])


def _asked(collator: BaseDataCollator, sample: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Column -> what the collator tells `preprocess` beside its texts: prompt and task."""
    mark = "embtune_asked"
    batch = replace(collator, preprocess_fn=lambda _, **asked: {mark: asked})(sample)
    return {key.removesuffix(f"_{mark}"): value for key, value in batch.items() if key.endswith(f"_{mark}")}


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two batches are the same, order and dtypes included."""
    if list(one) != list(other):
        return False
    for value, same in zip(one.values(), other.values(), strict=True):
        if not isinstance(value, torch.Tensor) or not isinstance(same, torch.Tensor):
            if type(value) is not type(same) or value != same:
                return False
        elif value.dtype != same.dtype or not torch.equal(value, same):
            return False
    return True
