"""Caches as the datasets of a Bridge run: their order is ours, in every version of Bridge."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.bridge.data.datasets.sft import GPTSFTChatDataset, GPTSFTDataset
from megatron.bridge.data.datasets.utils import _OnlineSampleMapping
from megatron.bridge.training.config import DatasetProvider
from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer
from megatron.core.datasets import helpers_cpp
from torch.utils.data import Dataset

from nemo_kd.bridge.models import tokenizer_config
from nemo_kd.cache import TopKCache
from nemo_kd.chat.samples import RenderedSamples
from nemo_kd.loss import KDLossConfig
from nemo_kd.process import say
from nemo_kd.student.dataset import CacheSamples
from nemo_kd.student.fit import check_fits
from nemo_kd.student.vocabulary import check_lacking


class GPTSFTKDDataset(CacheSamples, GPTSFTDataset):
    """Bridge's SFT dataset over a cache directory: see CacheSamples."""

    sample_mapping_class = _OnlineSampleMapping


class RenderedDataset(RenderedSamples, GPTSFTChatDataset):
    """Bridge's chat dataset with samples of a `Renderer`: see RenderedSamples."""


class Tokenizer:
    """Core's tokenizer with the names by which NeMo's is asked, so that fingerprints are equal."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self.tokenizer = core._tokenizer.tokenizer  # Hugging Face's
        # As NeMo finds it. Without it the datasets drop the blank between prompt and answer.
        tokens = self.tokenizer.tokenize
        self.space_sensitive = tokens("x y") != tokens("x") + tokens("y")

    def ids_to_tokens(self, ids: list[int]) -> list[str]:
        tokens: list[str] = self._core._tokenizer.ids_to_tokens(ids)
        return tokens

    def __getattr__(self, name: str) -> Any:
        if name == "_core":  # not there yet: while it is unpickled
            raise AttributeError(name)
        return getattr(self._core, name)


@dataclass(kw_only=True)
class KDCaches(DatasetProvider):
    """The section `dataset`: caches to train on, and caches to validate on.

    `train.eval_iters` is set to what one validation of all caches takes, so that each validation
    sees the whole of every set from its start.
    """

    train_caches: list[str]
    validation_caches: list[str] = field(default_factory=list)
    names: list[str] | None = None
    weights: list[float] | None = None
    seq_length: int = 4096
    pad_seq_length_to_mult: int = 16
    seed: int = 1
    dataloader_type: str = "batch"
    objective: KDLossConfig = field(default_factory=KDLossConfig)
    global_batch_size: int = 1

    def check(self) -> None:
        """Raise a ValueError if there are too few names or weights, or two names are equal."""
        for key, caches in ("names", self.validation_caches), ("weights", self.train_caches):
            given = getattr(self, key)
            if given is not None and len(given) != len(caches):
                raise ValueError(
                    f"dataset.{key}: expected one for each of {len(caches)} caches, got "
                    f"{len(given)}"
                )
        if len(set(self.set_names)) < len(self.set_names):
            raise ValueError(f"dataset.names: expected distinct names, got {self.set_names}")

    @property
    def set_names(self) -> list[str]:
        """Of the validation sets, as the logs have them."""
        return self.names or [Path(path).name for path in self.validation_caches]

    def build_datasets(self, context: Any) -> tuple[Any, Any, None]:
        make = partial(
            GPTSFTKDDataset,
            tokenizer=Tokenizer(context.tokenizer),
            kd_config=self.objective,
            max_seq_length=self.seq_length,
            pad_seq_length_to_mult=self.pad_seq_length_to_mult,
            seed=self.seed,
            get_attention_mask_from_fusion=True,
        )
        train = Blend(self.train_caches, self.weights, context.train_samples, make)
        sets = [make(path) for path in self.validation_caches]
        return train, Sets(sets, self.global_batch_size) if sets else None, None


def check_caches(dataset: KDCaches, hf_path: str) -> None:
    """Check the caches against the student's tokenizer, before its weights are read.

    Raises:
        ValueError: One does not fit.
    """
    dataset.check()
    tokenizer = Tokenizer(build_tokenizer(tokenizer_config(hf_path)))
    for path in (*dataset.train_caches, *dataset.validation_caches):
        cache, length = TopKCache.open(path), dataset.seq_length
        ids = check_fits(cache, dataset.objective, tokenizer=tokenizer, max_seq_length=length)
        if line := check_lacking(cache, ids):
            say(line)


def num_validation_steps(caches: list[str], global_batch_size: int) -> int:
    """The global batches of one validation, which sees the whole of every set."""
    return sum(math.ceil(len(TopKCache.open(path)) / global_batch_size) for path in caches)


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
        self.collate_fn = self.datasets[0].collate_fn

    def __len__(self) -> int:
        return len(self._cache_of)

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
        if place >= len(dataset):
            item = item | {"loss_mask": np.zeros_like(item["loss_mask"])}
        return item | {"set_index": number}

    def collate_fn(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        numbers = torch.tensor([item["set_index"] for item in batch])
        collated: dict[str, Any] = self.datasets[0].collate_fn(batch)
        return collated | {"set_index": numbers}
