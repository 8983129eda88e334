"""Caches as the datasets of a Bridge run: their order is ours, in every version of Bridge."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

from megatron.bridge.data.datasets.utils import _OnlineSampleMapping
from megatron.bridge.data.samplers import MegatronPretrainingBatchSampler
from megatron.bridge.training.config import DatasetProvider
from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer
from megatron.core import parallel_state

from nemo_kd.bridge.models import tokenizer_config
from nemo_kd.cache import SourceFile
from nemo_kd.chat.lines import check_files
from nemo_kd.chat.samples import (
    RenderedSamples,
    datasets_of,
    fingerprint_source,
    warn_of_missing_begin,
    with_found_format,
)
from nemo_kd.config import DataConfig
from nemo_kd.core_tokenizer import Tokenizer
from nemo_kd.loss import KDLossConfig
from nemo_kd.student.dataset import CacheSamples
from nemo_kd.student.fit import check_caches
from nemo_kd.student.packing import PackedCacheSamples, bounds_of_packs
from nemo_kd.student.sets import Blend, SetNames, Sets

try:
    from megatron.bridge.data.datasets.sft import (
        GPTSFTChatDataset,
        GPTSFTDataset,
        GPTSFTPackedDataset,
    )
except ModuleNotFoundError:  # as Bridge 0.6 names them
    from megatron.bridge.data.datasets.gpt_sft import GPTSFTChatDataset, GPTSFTDataset
    from megatron.bridge.data.packing.gpt_sft import GPTSFTPackedDataset


class GPTSFTKDDataset(CacheSamples, GPTSFTDataset):
    """Bridge's SFT dataset over a cache directory: see CacheSamples."""

    sample_mapping_class = _OnlineSampleMapping


class GPTSFTKDPackedDataset(PackedCacheSamples, GPTSFTPackedDataset):
    """Bridge's packed SFT dataset over a cache directory: see PackedCacheSamples."""

    samples_class = GPTSFTKDDataset

    def collate_fn(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        processed = super().collate_fn(batch)
        return processed | bounds_of_packs(batch, processed["tokens"].shape[1])


class ChatDataset(GPTSFTChatDataset):
    """Bridge's chat dataset, which takes all tokens of a sample that it must cut as supervised."""

    def _process_example(self, example: dict[str, Any]) -> dict[str, Any]:
        item: dict[str, Any] = super()._process_example(example)
        item |= {name: item[name][: self.max_seq_length + 1] for name in ("input_ids", "loss_mask")}
        context = item["context_ids"][: self.max_seq_length]
        return item | {"context_ids": context, "mask": item["loss_mask"]}

    def _ceil_to_nearest(self, n: int, m: int) -> int:
        """Bridge pads chats to a multiple of 16 alone."""
        return int(super()._ceil_to_nearest(n, max(m, self.pad_seq_length_to_mult)))


class RenderedDataset(RenderedSamples, ChatDataset):
    """Bridge's chat dataset with samples of a `Renderer`: see RenderedSamples."""


@dataclass(kw_only=True)
class KDCaches(SetNames, DatasetProvider):
    """The section `dataset`: caches to train on, and caches and files to validate on.

    `train.eval_iters` is set to what one validation of all sets takes, so that each validation sees
    the whole of every set from its start.
    """

    data: DataConfig | None = None  # what the samples of the files are made with
    packed_sequence: bool = False
    seq_length: int = 4096
    pad_seq_length_to_mult: int = 16
    seed: int = 1
    dataloader_type: str = "batch"
    objective: KDLossConfig = field(default_factory=KDLossConfig)
    global_batch_size: int = 1

    def data_of(self, path: str, says: bool = False) -> DataConfig:
        """What the samples of a validation file are made with."""
        assert self.data is not None  # the run checks it first
        return with_found_format(replace(self.data, file_names=(path,)), says)

    def build_datasets(self, context: Any) -> tuple[Any, Any, None]:
        _keep_order()
        tokenizer = Tokenizer(context.tokenizer)
        settings = {
            "tokenizer": tokenizer,
            "kd_config": self.objective,
            "reads_rows": parallel_state.is_pipeline_last_stage(),
            "max_seq_length": self.seq_length,
            "pad_seq_length_to_mult": self.pad_seq_length_to_mult,
            "seed": self.seed,
            "get_attention_mask_from_fusion": True,
        }
        make = make_train = partial(GPTSFTKDDataset, **settings)
        if self.packed_sequence:
            ranks = parallel_state.get_context_parallel_world_size()
            make_train = partial(GPTSFTKDPackedDataset, context_parallel_size=ranks, **settings)
        # Bridge makes a loader for a run that only validates as well.
        num_samples = context.train_samples or self.global_batch_size
        train = Blend(self.train_caches, self.weights, num_samples, make_train)
        sets = [make(path) for path in self.validation_caches]
        for path in self.validation_files:
            sources = [fingerprint_source(path)]
            multiple = self.pad_seq_length_to_mult
            sets += file_datasets(self.data_of(path), tokenizer, sources, multiple)
        warn_of_missing_begin(tokenizer, [*train.datasets, *sets])
        return train, Sets(sets, self.global_batch_size) if sets else None, None


def _keep_order() -> None:
    """Bridge 0.6 would shuffle what has its order already, that of the other host."""
    start = MegatronPretrainingBatchSampler.__init__
    if "shuffle" in inspect.signature(start).parameters:
        MegatronPretrainingBatchSampler.__init__ = partialmethod(start, shuffle=False)


def check_sets(dataset: KDCaches, hf_path: str) -> int:
    """Check caches and files against the student's tokenizer, before its weights are read.

    Returns:
        The global batches of one validation, which sees the whole of every set.

    Raises:
        ValueError: One does not fit.
    """
    dataset.check()
    tokenizer = read_tokenizer(Path(hf_path), "model.hf_path")
    rest = (dataset.objective, tokenizer, dataset.seq_length)
    check_caches(dataset.train_caches, *rest)
    sizes = check_caches(dataset.validation_caches, *rest)
    sizes += [
        check_files(dataset.data_of(path, says=True), tokenizer, "data").num_samples
        for path in dataset.validation_files
    ]
    return sum(math.ceil(size / dataset.global_batch_size) for size in sizes)


def read_tokenizer(path: Path, key: str) -> Tokenizer:
    """The tokenizer in a Hugging Face directory; `key` named it, for the ValueError."""
    if not any(path.glob("tokenizer*")):
        raise ValueError(f"{key}: expected a Hugging Face directory, found no {path}/tokenizer*")
    return Tokenizer(build_tokenizer(tokenizer_config(str(path))))


def file_datasets(
    data: DataConfig, tokenizer: Tokenizer, sources: Sequence[SourceFile], multiple: int = 1
) -> list[Any]:
    """Each file of `data` as a dataset, whose batches' lengths are padded to `multiple`."""
    settings = {"pad_seq_length_to_mult": multiple, "get_attention_mask_from_fusion": True}
    classes = (GPTSFTDataset, ChatDataset, RenderedDataset)
    return datasets_of(data, tokenizer, sources, classes, **settings)
