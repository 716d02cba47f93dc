"""Batches of several data sets, each gone through as often in an epoch as its weight says."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import torch
from sentence_transformers.base.sampler import MultiDatasetDefaultBatchSampler
from torch.utils.data import BatchSampler, ConcatDataset

from embtune.errors import ArgumentError

# Samplers that seed themselves by the epoch would draw a repeated pass in the same order as the first.
_BETWEEN_PASSES = 1_000_003


def check_weights(weights: Mapping[str, float] | None, data: object) -> None:
    """Raise unless each weight is for one of several data sets.

    Raises:
        ArgumentError: there is one data set only, or none of that name.
    """
    if not weights:
        return
    if not isinstance(data, Mapping):
        raise ArgumentError("dataset_weights is for several data sets, and train_dataset is one; leave it out.")
    for name in weights:
        if name not in data:
            near = difflib.get_close_matches(name, data, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(data)}."
            raise ArgumentError(f"dataset_weights: there is no data set {name!r}; {hint}")


class WeightedBatchSampler(MultiDatasetDefaultBatchSampler):
    """Draws, in random order, `weight × batches of the data set` batches from each data set, one at least.

    A batch holds rows of one data set. What is drawn beyond a data set's last batch comes from another pass over it, in
    another order; below weight 1 an epoch sees a random part of it. Each epoch's batches follow from seed and epoch.

    Args:
        weights: one for each data set of `dataset`.
        Others are sentence-transformers'.
    """

    def __init__(
        self,
        dataset: ConcatDataset,
        batch_samplers: list[BatchSampler],
        weights: Sequence[float],
        generator: torch.Generator | None = None,
        seed: int | None = 0,
    ) -> None:
        super().__init__(dataset, batch_samplers, generator, seed)
        self.counts = [
            max(1, round(weight * len(sampler))) for weight, sampler in zip(weights, batch_samplers, strict=True)
        ]
        """Batches that an epoch takes from each data set."""

    def __len__(self) -> int:
        return sum(self.counts)

    def __iter__(self) -> Iterator[list[int]]:
        if self.generator is not None and self.seed is not None:
            self.generator.manual_seed(self.seed + self.epoch)
        owners = torch.tensor([owner for owner, count in enumerate(self.counts) for _ in range(count)])
        order = owners[torch.randperm(len(owners), generator=self.generator)].tolist()
        offsets = [0, *accumulate(len(part) for part in self.dataset.datasets)]
        passes = [self._passes(sampler) for sampler in self.batch_samplers]
        for owner in order:
            yield [offsets[owner] + index for index in next(passes[owner])]

    def _passes(self, sampler: BatchSampler) -> Iterator[list[int]]:
        number = 0
        while True:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch + number * _BETWEEN_PASSES)
            yield from sampler
            number += 1
