"""The teacher run: a host's samples -> forward through Megatron -> rows -> cache.

Each data-parallel replica of the teacher, of this job and of any other on the same cache, claims a
missing shard, fills it and claims the next. The samples of a shard go through in windows. A window
is sorted by length, so that its micro batches need little padding, and is written in its own order.
So every micro batch depends on nothing but the shard and the manifest.
"""

from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader

from nemo_kd.cache import CacheWriter
from nemo_kd.chat.samples import cut_sample
from nemo_kd.config import DataConfig
from nemo_kd.process import shield_workers
from nemo_kd.selection import TeacherRows
from nemo_kd.teacher.forward import Teacher
from nemo_kd.teacher.progress import Progress
from nemo_kd.teacher.replica import Replica

# How many micro batches are sorted by length together. Their rows wait in the CPU's memory.
_MICRO_BATCHES_PER_WINDOW = 16


@dataclass
class TeacherRun:
    """One replica's part of the work on a cache, together with every other replica's."""

    writer: CacheWriter
    replica: Replica
    teacher: Teacher
    samples: ConcatDataset[Any]  # as a host's dataset builds them; samples.datasets[0] collates
    data: DataConfig
    num_truncated: int = 0  # samples of this run that chat/ had to cut

    def fill(self, shards: list[int], shows_progress: bool) -> None:
        """Fills `shards` of the cache; returns when all of them are published."""
        missing = self.writer.missing_shards(shards)
        with (
            Progress(self.writer, missing, shows_progress) as progress,
            closing(self.replica.claim_shards(self.writer, shards, progress.wait)) as claims,
        ):
            for shard in claims:
                self._fill_shard(shard, progress)
                progress.look()

    def _fill_shard(self, shard: int, progress: Progress) -> None:
        """Runs the teacher over one shard, which the leader writes."""
        indices = self.writer.manifest.shard_samples(shard)
        with self.writer.shard(shard) if self.replica.leads else nullcontext() as sink:
            for first, items in self._windows(indices):
                self._fill_window(sink, first, items, progress)

    def _windows(self, indices: range) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """A shard's samples, tokenised, window by window: the first one's number, and all."""
        size = self.data.micro_batch_size * _MICRO_BATCHES_PER_WINDOW
        windows = [indices[start : start + size] for start in range(0, len(indices), size)]
        loader = DataLoader(
            self.samples,
            batch_sampler=windows,
            num_workers=self.data.num_workers,
            collate_fn=list,
        )
        shield_workers(loader)
        return ((window[0], items) for window, items in zip(windows, loader, strict=True))

    def _fill_window(
        self, sink: Any, first: int, items: list[dict[str, Any]], progress: Progress
    ) -> None:
        """Adds a window's samples and their rows to `sink`, if there is one."""
        dataset = self.samples.datasets[0]
        size = self.data.micro_batch_size
        longest_first = sorted(range(len(items)), key=lambda index: -len(items[index]["input_ids"]))
        micro_batches = [longest_first[i : i + size] for i in range(0, len(items), size)]
        batches = [
            dataset.collate_fn([items[i] for i in indices])
            | {"sample_numbers": first + torch.tensor(indices)}
            for indices in micro_batches
        ]
        rows_of: dict[int, TeacherRows] = {}
        # Not strict: only the last pipeline stage gets rows.
        results = zip(micro_batches, batches, self.teacher.rows(batches), strict=False)
        for indices, batch, rows in results:
            counts = batch["loss_mask"].sum(1).tolist()
            parts = zip(*(tensor.split(counts) for tensor in rows), strict=True)
            rows_of |= {i: TeacherRows(*part) for i, part in zip(indices, parts, strict=True)}
            progress.add(len(indices), sum(len(items[i]["input_ids"]) for i in indices))
        self.num_truncated += sum(item.get("is_truncated", False) for item in items)
        for index, item in enumerate(items):
            sample = cut_sample(item, dataset)
            if sink is not None:
                sink.add(*sample, *(tensor.numpy() for tensor in rows_of[index]))
