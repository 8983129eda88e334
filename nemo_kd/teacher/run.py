"""The teacher run: a host's samples -> forward through Megatron -> rows -> cache.

Each data-parallel replica of the teacher, of this job and of any other on the same cache, claims a
missing shard, fills it and claims the next. Within a shard, samples go through in windows; a
window's samples are sorted by length, so that the micro batches waste little on padding, and
written in their own order. So every micro batch depends on the shard and the manifest alone.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader
from tqdm import tqdm

from nemo_kd.cache import CacheWriter
from nemo_kd.config import DataConfig
from nemo_kd.process import shield_workers
from nemo_kd.selection import TeacherRows
from nemo_kd.teacher.forward import Teacher
from nemo_kd.teacher.replica import Replica

# Micro batches that are sorted by length together; their rows wait in the host's memory.
_MICRO_BATCHES_PER_WINDOW = 16

CutSample = Callable[[dict[str, Any], Any], tuple[Any, Any, int]]


def parse_shards(text: str | int | None, num_shards: int) -> list[int]:
    """Return the shards of "0-99", 7 or "0-3,8"; all of them for None.

    Raises:
        ValueError: Another form, or a shard that the cache does not have.
    """
    if text is None:
        return list(range(num_shards))
    shards: list[int] = []
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise ValueError(f'cache.shards: expected 0-99, 7 or "0-3,8", got {text!r}')
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < num_shards:
            raise ValueError(
                f"cache.shards: expected shards from 0 to {num_shards - 1}, got {part.strip()}"
            )
        shards += range(first, last + 1)
    return shards


def fill(
    writer: CacheWriter,
    shards: list[int],
    replica: Replica,
    teacher: Teacher,
    samples: ConcatDataset[Any],
    data: DataConfig,
    cut_sample: CutSample,
    shows_progress: bool,
) -> None:
    """Fill `shards` of the cache, together with every other replica that is at work on it.

    Args:
        samples: by number, as a host's dataset builds them; `samples.datasets[0]` collates.
        cut_sample: a sample and that dataset to tokens, loss mask and context length, as the cache
            has them.
        shows_progress: whether this process shows the progress bar.
    """
    missing = writer.missing_shards(shards)
    with (
        tqdm(
            desc=f"{writer.path.name}: {len(missing)} of {writer.manifest.num_shards} shards",
            total=sum(len(writer.manifest.shard_samples(shard)) for shard in missing),
            unit="sample",
            disable=not (shows_progress and missing),
            mininterval=1,
        ) as bar,
        closing(replica.claim_shards(writer, shards)) as claims,
    ):
        num_tokens, start = 0, time.monotonic()
        for shard in claims:
            num_tokens += _fill_shard(
                writer, shard, teacher, samples, data, cut_sample, replica.leads
            )
            # The bar is one replica's, and counts what the others have published meanwhile.
            done = len(missing) - len(writer.missing_shards(missing))
            bar.set_postfix_str(
                f"{num_tokens / (time.monotonic() - start):,.0f} tokens/s a replica",
                refresh=False,
            )
            bar.update(min(bar.total, done * writer.manifest.samples_per_shard) - bar.n)


def _fill_shard(
    writer: CacheWriter,
    shard: int,
    teacher: Teacher,
    samples: ConcatDataset[Any],
    data: DataConfig,
    cut_sample: CutSample,
    writes: bool,
) -> int:
    """Fill one shard, on the leader also its files; return its tokens."""
    num_tokens = 0
    indices = writer.manifest.shard_samples(shard)
    with writer.shard(shard) if writes else nullcontext() as sink:
        for first, items in _windows(samples, indices, data):
            num_tokens += _fill_window(
                sink, first, items, teacher, samples.datasets[0], data, cut_sample
            )
    return num_tokens


def _windows(
    samples: ConcatDataset[Any], indices: range, data: DataConfig
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """A shard's samples, tokenised, window by window: the number of the first, and all of them."""
    size = data.micro_batch_size * _MICRO_BATCHES_PER_WINDOW
    windows = [indices[start : start + size] for start in range(0, len(indices), size)]
    loader = DataLoader(
        samples,
        batch_sampler=windows,
        num_workers=data.num_workers,
        collate_fn=list,
    )
    shield_workers(loader)
    return ((window[0], items) for window, items in zip(windows, loader, strict=True))


def _fill_window(
    sink: Any,
    first: int,
    items: list[dict[str, Any]],
    teacher: Teacher,
    dataset: Any,
    data: DataConfig,
    cut_sample: CutSample,
) -> int:
    """Add a window's samples and their rows to `sink`, if there is one; return its tokens."""
    longest_first = sorted(range(len(items)), key=lambda index: -len(items[index]["input_ids"]))
    micro_batches = [
        longest_first[start : start + data.micro_batch_size]
        for start in range(0, len(items), data.micro_batch_size)
    ]
    batches = [
        dataset.collate_fn([items[i] for i in indices])
        | {"sample_numbers": first + torch.tensor(indices)}
        for indices in micro_batches
    ]
    rows_of: dict[int, TeacherRows] = {}
    for indices, batch, rows in zip(micro_batches, batches, teacher.rows(batches), strict=False):
        counts = batch["loss_mask"].sum(1).tolist()
        parts = zip(*(tensor.split(counts) for tensor in rows), strict=True)
        rows_of |= {i: TeacherRows(*part) for i, part in zip(indices, parts, strict=True)}
    num_tokens = 0
    for index, item in enumerate(items):
        tokens, loss_mask, context_length = cut_sample(item, dataset)
        num_tokens += len(tokens)
        if sink is not None:
            sink.add(
                tokens,
                loss_mask,
                context_length,
                *(tensor.numpy() for tensor in rows_of[index]),
            )
    return num_tokens
