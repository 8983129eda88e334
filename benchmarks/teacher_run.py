"""How much of a teacher run's time a fast teacher works: the forward pass sleeps, the rest is real.

    python benchmarks/teacher_run.py [--small] [--tokens-per-s 34000] [--workers 2]

34,000 tokens/s is what an 8B teacher does on an H100 (480 ms for 16,384 tokens). Samples are
tokenised already, so that the workers only cut, sort and collate. V = 128,256, K = 100, packed, two
thirds of the tokens supervised.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset

from nemo_kd.cache import CacheWriter, Manifest
from nemo_kd.config import DataConfig
from nemo_kd.selection import TeacherRows
from nemo_kd.teacher.forward import HostRows
from nemo_kd.teacher.replica import Replica
from nemo_kd.teacher.run import TeacherRun

VOCAB_SIZE = 128_256
K = 100
LENGTH = 1024  # of the longest sample, in tokens


class Samples(Dataset[Any]):
    """Samples of random tokens, as a host's dataset makes them and collates them."""

    max_seq_length = LENGTH

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(index)
        length = int(rng.integers(LENGTH // 4, LENGTH))
        mask = np.arange(length) >= length // 3
        return {
            "input_ids": rng.integers(VOCAB_SIZE, size=length).tolist(),
            "mask": mask,
            "context_ids": [0] * (length // 3),
        }

    def collate_fn(self, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(item["input_ids"]) for item in batch)
        tokens = torch.zeros(len(batch), length, dtype=torch.long)
        loss_mask = torch.zeros(len(batch), length)
        for row, item in enumerate(batch):
            tokens[row, : len(item["input_ids"])] = torch.tensor(item["input_ids"])
            # The row that predicts a token stands before it.
            loss_mask[row, : len(item["mask"]) - 1] = torch.from_numpy(item["mask"][1:]).float()
        positions = torch.arange(length).expand_as(tokens)
        return {
            "tokens": tokens,
            "labels": tokens,
            "loss_mask": loss_mask,
            "position_ids": positions.contiguous(),
        }


@dataclass
class SleepingTeacher:
    """Returns rows of random ids after the time that a teacher would take."""

    tokens_per_s: float
    slept_s: float = 0.0
    _rows: Any = field(default=None)

    def rows(self, batches: list[dict[str, torch.Tensor]]) -> list[HostRows]:
        if self._rows is None:
            most = max(batch["tokens"].numel() for batch in batches) * 2
            ids = torch.stack([torch.randperm(VOCAB_SIZE)[:K] for _ in range(64)]).int()
            log_probs = (torch.randn(64, K) * 3).log_softmax(-1).sort(descending=True).values - 0.1
            rows = (ids, log_probs, torch.full((64,), -2.0))
            self._rows = [part.repeat(-(-most // 64), *[1] * (part.dim() - 1)) for part in rows]
        collected = []
        for batch in batches:
            seconds = batch["tokens"].numel() / self.tokens_per_s
            time.sleep(seconds)
            self.slept_s += seconds
            count = int(batch["loss_mask"].sum())
            collected.append(HostRows(TeacherRows(*(part[:count] for part in self._rows))))
        return collected


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="seconds instead of a minute")
    parser.add_argument("--tokens-per-s", type=float, default=34_000)
    parser.add_argument("--workers", type=int, default=2, help="data.num_workers of the dump")
    arguments = parser.parse_args()
    num_samples = 256 if arguments.small else 3072
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    samples = Samples(num_samples)
    manifest = Manifest(
        selection={"kind": "top_k", "k": K, "temperature": 1.0},
        dataset={"max_seq_length": LENGTH},
        codec="packed",
        vocab_size=VOCAB_SIZE,
        tokenizer_fingerprint="t",
        teacher_fingerprint="t",
        sources=(),
        num_samples=num_samples,
        samples_per_shard=1024,
    )
    data = DataConfig(
        file_names=["samples"],
        micro_batch_size=4,
        max_seq_length=LENGTH,
        num_workers=arguments.workers,
    )
    with tempfile.TemporaryDirectory() as directory:
        writer = CacheWriter.open(Path(directory) / "cache", manifest)
        teacher: Any = SleepingTeacher(arguments.tokens_per_s)
        replica = Replica(torch.distributed.group.WORLD, leads=True)
        run = TeacherRun(writer, replica, teacher, ConcatDataset([samples]), data)
        begin = time.perf_counter()
        run.fill(list(range(manifest.num_shards)), shows_progress=False)
        seconds = time.perf_counter() - begin
        num_rows = sum(record_rows(writer.path))
    print(
        f"{num_samples} samples, {num_rows:,} rows, {seconds:.1f} s: the teacher works "
        f"{teacher.slept_s / seconds:.1%} of the time ({num_rows / seconds:,.0f} rows/s)"
    )


def record_rows(path: Path) -> list[int]:
    """The supervised tokens of each shard."""
    from nemo_kd.cache import TopKCache

    cache = TopKCache.open(path)
    return [cache.shard_record(i).num_supervised_tokens for i in range(cache.num_shards)]


if __name__ == "__main__":
    main()
