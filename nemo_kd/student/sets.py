"""Training sets blended into one, and validation sets one after another: their order is ours."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets import helpers_cpp
from torch.utils.data import Dataset


@dataclass(kw_only=True)
class SetNames:
    """The sets of a run: caches to train on, and caches and files to validate on."""

    train_caches: list[str]
    validation_caches: list[str] = field(default_factory=list)
    validation_files: list[str] = field(default_factory=list)
    names: list[str] | None = None
    weights: list[float] | None = None

    def check(self) -> None:
        """Raise a ValueError if there are too few names or weights, or two names are equal."""
        sets = [*self.validation_caches, *self.validation_files]
        for key, paths in ("names", sets), ("weights", self.train_caches):
            given = getattr(self, key)
            if given is not None and len(given) != len(paths):
                raise ValueError(
                    f"dataset.{key}: expected one for each of {len(paths)} sets, got {len(given)}"
                )
        if len(set(self.set_names)) < len(self.set_names):
            raise ValueError(f"dataset.names: expected distinct names, got {self.set_names}")

    @property
    def set_names(self) -> list[str]:
        """Of the validation sets, as the logs have them."""
        sets = (*self.validation_caches, *self.validation_files)
        return self.names or [Path(path).name for path in sets]


class Blend(Dataset[Any]):
    """Training caches, blended by Megatron: next is the cache that lags most behind its weight."""

    def __init__(
        self, paths: list[str], weights: list[float] | None, num_samples: int, make: Any
    ) -> None:
        shares = np.array(weights or [1.0] * len(paths), dtype=np.float64)
        shares /= shares.sum()
        self._cache_of = np.zeros(num_samples, dtype=np.int16)
        self._number_in = np.zeros(num_samples, dtype=np.int64)
        helpers_cpp.build_blending_indices(
            self._cache_of, self._number_in, shares, len(paths), num_samples, False
        )
        # As many as NeMo asks of each, because the number of its epochs shapes the order.
        counts = [math.ceil(num_samples * share * 1.005) for share in shares]
        self.datasets = [
            make(path, max_num_samples=count) for path, count in zip(paths, counts, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._cache_of)

    def collate_fn(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        """A replica's whole global batch, which a host then cuts into micro batches.

        Each of these has `whole_batch`, a dictionary, which is not cut: the supervised tokens of
        every sample of the whole, [B].
        """
        collated: dict[str, Any] = self.datasets[0].collate_fn(batch)
        num_supervised = collated["loss_mask"].count_nonzero(dim=1)
        return collated | {"whole_batch": {"num_supervised": num_supervised}}

    def __getitem__(self, index: int) -> dict[str, Any]:
        dataset = self.datasets[self._cache_of[index]]
        item: dict[str, Any] = dataset[int(self._number_in[index])]
        return item


class Sets(Dataset[Any]):
    """Validation sets one after another, each filled up to whole global batches.

    What fills a batch up is its set's last sample with nothing supervised, which weighs nothing. A
    batch has `set_index`, the number of its set, for each sample.
    """

    def __init__(self, datasets: list[Any], global_batch_size: int) -> None:
        self.datasets = datasets
        sizes = [math.ceil(len(each) / global_batch_size) * global_batch_size for each in datasets]
        self._starts = [0, *accumulate(sizes)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = bisect_right(self._starts, index) - 1
        dataset, place = self.datasets[number], index - self._starts[number]
        item: dict[str, Any] = dataset[min(place, len(dataset) - 1)]
        return item | {"set_index": number, "fills_up": place >= len(dataset)}

    def collate_fn(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        """A micro batch is of one set, whose dataset knows how to collate it."""
        numbers = torch.tensor([item["set_index"] for item in batch])
        collated: dict[str, Any] = self.datasets[int(numbers[0])].collate_fn(batch)
        fills_up = torch.tensor([item["fills_up"] for item in batch])
        # Not in place: the mask may share its memory with a sample of a cache.
        loss_mask = collated["loss_mask"].masked_fill(fills_up[:, None], 0)
        return collated | {"set_index": numbers, "loss_mask": loss_mask}
