"""Several data sets, each gone through as often as its weight says."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch.utils.data import ConcatDataset, RandomSampler

from embtune import FastSentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from embtune.errors import ArgumentError
from embtune.losses import MultipleNegativesRankingLoss
from embtune.train.sampling import WeightedBatchSampler


def sampler(weights: list[float], sizes: tuple[int, ...] = (8, 12)) -> WeightedBatchSampler:
    generator = torch.Generator()
    parts = [Dataset.from_dict({"text": [str(row) for row in range(size)]}) for size in sizes]
    each = [
        DefaultBatchSampler(RandomSampler(part, generator=generator), batch_size=4, drop_last=False) for part in parts
    ]
    return WeightedBatchSampler(ConcatDataset(parts), each, weights, generator, seed=3)


def test_each_row_is_seen_as_often_as_its_weight_says() -> None:
    weighted = sampler([2, 1 / 3])
    batches = list(weighted)
    assert len(batches) == len(weighted) == 5
    assert all(max(batch) < 8 or min(batch) >= 8 for batch in batches)
    seen = Counter(row for batch in batches for row in batch)
    assert all(seen[row] == 2 for row in range(8))
    assert sum(seen[row] for row in range(8, 20)) == 4
    own = [tuple(batch) for batch in batches if max(batch) < 8]
    assert len(set(own)) == 4  # the second pass is in another order


def test_batches_follow_from_seed_and_epoch() -> None:
    one, other = sampler([2, 1]), sampler([2, 1])
    assert list(one) == list(other)
    first = list(one)
    one.set_epoch(1)
    assert list(one) != first
    other.set_epoch(1)
    assert list(one) == list(other)


def test_the_trainer_takes_weights(tiny_dir: Any, tmp_path: Path) -> None:
    rows = {"anchor": [f"a {n}" for n in range(8)], "positive": [f"b {n}" for n in range(8)]}
    data = DatasetDict(left=Dataset.from_dict(rows), right=Dataset.from_dict(rows))
    model = FastSentenceTransformer.from_pretrained(tiny_dir("bert"), device="cpu")
    FastSentenceTransformer.get_peft_model(model, r=2)

    def trainer(train: Any, **weights: float) -> SentenceTransformerTrainer:
        args = SentenceTransformerTrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, report_to="none", dataset_weights=weights, use_cpu=True
        )
        loss = MultipleNegativesRankingLoss(model)
        return SentenceTransformerTrainer(model=model, args=args, train_dataset=train, loss=loss)

    assert len(trainer(data, left=2, right=0.5).get_train_dataloader()) == 5
    with pytest.raises(ArgumentError, match="no data set 'centre'; there are left, right"):
        trainer(data, centre=2)
    with pytest.raises(ArgumentError, match="no data set 'rigth'; did you mean 'right'?"):
        trainer(data, rigth=2)
    with pytest.raises(ArgumentError, match="for several data sets"):
        trainer(data["left"], left=2)
    with pytest.raises(ArgumentError, match=r"left=-1.* must be a number above 0"):
        trainer(data, left=-1)
