"""The teacher run: a host's samples -> forward through Megatron -> rows -> cache.

Each data-parallel replica of the teacher, of this job and of any other on the same cache, claims a
missing shard, fills it and claims the next. The samples of a shard go through in windows. A window
is sorted by length, so that its micro batches need little padding, and is written in its own order.
So every micro batch depends on nothing but the shard, the manifest and data.micro_batch_size.

Three things go on at the same time: worker processes make the next windows, the model computes this
one, and a thread encodes and writes the ones before.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader

from nemo_kd.cache import CacheWriter
from nemo_kd.chat.samples import cut_sample
from nemo_kd.config import DataConfig
from nemo_kd.process import shield_workers
from nemo_kd.selection import TeacherRows
from nemo_kd.teacher.forward import HostRows, Teacher
from nemo_kd.teacher.progress import Progress
from nemo_kd.teacher.replica import Replica

# How many micro batches are sorted by length together. Their rows wait in the CPU's memory.
_MICRO_BATCHES_PER_WINDOW = 16
# How many windows may wait to be written. More would only take memory.
_WAITING_WINDOWS = 2
_TENSORS = ("tokens", "position_ids", "labels", "loss_mask")


class Window(NamedTuple):
    """Samples that are sorted by length together, as a worker process makes them."""

    samples: list[tuple[Any, Any, int]]  # tokens [T], loss mask [T] and context length of each
    micro_batches: list[list[int]]  # the samples of each micro batch, by their place in the window
    batches: list[dict[str, Any]]  # the _TENSORS of each micro batch, as arrays [B, S]
    num_truncated: int  # samples that chat/ had to cut


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
        # The thread ends before the shard is published, or removed after an error.
        with (
            self.writer.shard(shard) if self.replica.leads else nullcontext() as sink,
            InOrder(_WAITING_WINDOWS) as thread,
        ):
            for first, window in self._windows(indices):
                rows = self._compute(first, window, progress)
                self.num_truncated += window.num_truncated
                if sink is not None:
                    thread.submit(partial(_write, sink, window, rows))

    def _windows(self, indices: range) -> Iterator[tuple[int, Window]]:
        """A shard's windows, each with the number of its first sample."""
        size = self.data.micro_batch_size * _MICRO_BATCHES_PER_WINDOW
        starts = [indices[start : start + size] for start in range(0, len(indices), size)]
        loader = DataLoader(
            self.samples,
            batch_sampler=starts,
            num_workers=self.data.num_workers,
            collate_fn=partial(_make_window, self.samples.datasets[0], self.data.micro_batch_size),
        )
        shield_workers(loader)
        return ((numbers[0], window) for numbers, window in zip(starts, loader, strict=True))

    def _compute(self, first: int, window: Window, progress: Progress) -> list[HostRows]:
        """The rows of each micro batch."""
        batches = [
            {name: torch.from_numpy(array) for name, array in batch.items()}
            | {"sample_numbers": first + torch.tensor(indices)}
            for indices, batch in zip(window.micro_batches, window.batches, strict=True)
        ]
        rows = self.teacher.rows(batches)
        for indices in window.micro_batches:
            progress.add(len(indices), sum(len(window.samples[i][0]) for i in indices))
        return rows


def _make_window(dataset: Any, micro_batch_size: int, items: list[dict[str, Any]]) -> Window:
    """Cut, sort and collate the samples of a window. A worker process does it.

    Tensors become arrays, because tensors would travel through shared memory, of which a container
    has little.
    """
    longest_first = sorted(range(len(items)), key=lambda index: -len(items[index]["input_ids"]))
    starts = range(0, len(items), micro_batch_size)
    micro_batches = [longest_first[start : start + micro_batch_size] for start in starts]
    collated = [dataset.collate_fn([items[i] for i in indices]) for indices in micro_batches]
    return Window(
        samples=[cut_sample(item, dataset) for item in items],
        micro_batches=micro_batches,
        batches=[{name: batch[name].numpy() for name in _TENSORS} for batch in collated],
        num_truncated=sum(item.get("is_truncated", False) for item in items),
    )


def _write(sink: Any, window: Window, rows: list[HostRows]) -> None:
    """Add a window's samples and their rows to `sink`."""
    rows_of: dict[int, TeacherRows] = {}
    for indices, batch, pending in zip(window.micro_batches, window.batches, rows, strict=True):
        counts = np.count_nonzero(batch["loss_mask"], axis=1).tolist()
        parts = zip(*(tensor.split(counts) for tensor in pending.wait()), strict=True)
        rows_of |= {i: TeacherRows(*part) for i, part in zip(indices, parts, strict=True)}
    for index, sample in enumerate(window.samples):
        sink.add(*sample, *(tensor.numpy() for tensor in rows_of[index]))


class InOrder:
    """A thread that does one thing after another while its owner goes on.

    Args:
        num_waiting: How many may wait. `submit` waits until there is room.
    """

    def __init__(self, num_waiting: int) -> None:
        self._num_waiting = num_waiting
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._waiting: deque[Future[None]] = deque()

    def submit(self, work: Callable[[], None]) -> None:
        """Do `work` after what came before. Raises what one that came before has raised."""
        while len(self._waiting) >= self._num_waiting:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(work))

    def __enter__(self) -> "InOrder":
        return self

    def __exit__(self, error: Any, *_: object) -> None:
        try:
            while error is None and self._waiting:
                self._waiting.popleft().result()
        finally:
            # What is running ends first, because it writes into files that are removed next.
            self._pool.shutdown(wait=True, cancel_futures=True)
