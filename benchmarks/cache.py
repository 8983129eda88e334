"""Bytes, writing and reading of each codec and selection, beside JSONL as NeMo-Aligner lays it out.

    python benchmarks/cache.py --cache CACHE      # the rows of a raw cache of K = 100 or more
    python benchmarks/cache.py [--small]          # synthetic rows, V = 128,256, random ids

All formats hold the same samples, in one run on one core. Times are CPU times of this process.
Bytes are those of the files that hold the rows, with their .idx and without tokens and loss masks.
JSONL has one line a sample with bfloat16 logits and a row for each supervised token (NeMo-Aligner's
has rows for prompt and padding, too). Scanned: the reader looks for its line from the file's start,
as NeMo-Aligner's does. Indexed: it knows where the line starts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from nemo_kd.cache import CacheWriter, Manifest, Sample, TopKCache

K = 100
NUM_DRAWS = 50
NUM_SUPERVISED = 64  # supervised tokens of a sample, as in an answer of ordinary length
_NUM_READS = 128
SELECTIONS: dict[str, dict[str, Any]] = {
    "top_k": {"kind": "top_k", "k": K, "temperature": 1.0},
    "top_p": {"kind": "top_p", "k": K, "p": 0.99, "temperature": 1.0},
    "sample": {"kind": "sample", "num_draws": NUM_DRAWS, "seed": 0, "temperature": 1.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cache", type=Path, help="a raw cache of K = 100 or more")
    parser.add_argument("--small", action="store_true", help="seconds instead of a minute")
    arguments = parser.parse_args()
    num_samples = 32 if arguments.small else 1024
    if arguments.cache is None:
        vocab_size, samples = 128_256, list(_synthetic(num_samples, 128_256))
    else:
        cache = TopKCache.open(arguments.cache)
        vocab_size = cache.manifest.vocab_size
        samples = list(islice(_joined(cache), num_samples))
    num_rows = sum(len(sample.topk_ids) for sample in samples)
    print(f"{len(samples)} samples, {num_rows} supervised tokens, V = {vocab_size:,}, K = {K}\n")
    columns = ("", "bytes a token", "entries a row", "written, rows/s", "read at random, rows/s")
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    rng = np.random.default_rng(0)
    kept = {
        "top_k": [_top_k(sample) for sample in samples],
        "top_p": [_top_p(sample) for sample in samples],
        "sample": [_draw(sample, vocab_size, rng) for sample in samples],
    }
    with tempfile.TemporaryDirectory() as directory:
        for kind, codec in (
            ("top_k", "raw"),
            ("top_k", "packed"),
            ("top_p", "raw"),
            ("top_p", "packed"),
            ("sample", "raw"),
            ("sample", "packed"),
        ):
            path = Path(directory) / f"{kind}-{codec}"
            name = {"top_k": "top_k 100", "top_p": "top_p 0.99", "sample": "sample 50"}[kind]
            _report(f"{name}, {codec}", kept[kind], *_cache(path, kind, codec, kept, vocab_size))
        path = Path(directory) / "rows.jsonl"
        write, read_scanning, read_indexed = _jsonl(path, kept["top_k"])
        _report("top_k 100, JSONL scanned", kept["top_k"], write, read_scanning)
        _report("top_k 100, JSONL indexed", kept["top_k"], write, read_indexed)


def _report(
    name: str,
    samples: list[Sample],
    write: Callable[[], int],
    read: Callable[[int], Sample],
) -> None:
    """One line of the table; `write` returns bytes, `read` a sample by its number."""
    num_rows = sum(len(sample.topk_ids) for sample in samples)
    num_entries = sum(int((sample.topk_ids >= 0).sum()) for sample in samples)
    start = time.process_time()
    size_bytes = write()
    write_seconds = time.process_time() - start
    numbers = np.random.default_rng(1).permutation(len(samples))[:_NUM_READS].tolist()
    num_read = sum(len(samples[number].topk_ids) for number in numbers)
    read_seconds = min(_seconds(read, numbers) for _ in range(3))
    print(
        f"| {name} | {size_bytes / num_rows:.1f} | {num_entries / num_rows:.1f} "
        f"| {num_rows / write_seconds:,.0f} | {num_read / read_seconds:,.0f} |",
        flush=True,
    )


def _seconds(read: Callable[[int], Sample], numbers: list[int]) -> float:
    start = time.process_time()
    for number in numbers:
        read(number)
    return time.process_time() - start


def _cache(
    path: Path, kind: str, codec: str, kept: dict[str, list[Sample]], vocab_size: int
) -> tuple[Callable[[], int], Callable[[int], Sample]]:
    samples = kept[kind]
    manifest = Manifest(
        selection=SELECTIONS[kind],
        vocab_size=vocab_size,
        tokenizer_fingerprint="benchmark",
        teacher_fingerprint="benchmark",
        sources=(),
        dataset={},
        num_samples=len(samples),
        samples_per_shard=len(samples),
        codec=codec,
    )

    def write() -> int:
        with CacheWriter.open(path, manifest).shard(0) as shard:
            for sample in samples:
                shard.add(**sample._asdict())
        files = (path / "shard-00000").iterdir()
        not_rows = ("tokens", "loss_mask", "context_length", "shard")
        return sum(file.stat().st_size for file in files if file.stem not in not_rows)

    opened: list[TopKCache] = []

    def read(number: int) -> Sample:
        if not opened:
            opened.append(TopKCache.open(path))
        return opened[0][number]

    return write, read


def _jsonl(
    path: Path, samples: list[Sample]
) -> tuple[Callable[[], int], Callable[[int], Sample], Callable[[int], Sample]]:
    starts: list[int] = []

    def write() -> int:
        starts.clear()
        rows_bytes = 0
        with open(path, "wb") as file:
            for sample in samples:
                bfloat16 = (sample.topk_log_probs.view(np.uint32) & 0xFFFF0000).view(np.float32)
                rows = {
                    "topk_logits": bfloat16.tolist(),
                    "topk_token_ids": sample.topk_ids.tolist(),
                    "log_sum_exp_logits": [0.0] * len(sample.topk_ids),
                }
                whole = {"tokens": sample.tokens.tolist(), "loss_mask": sample.loss_mask.tolist()}
                rows_bytes += len(json.dumps(rows))
                starts.append(file.tell())
                file.write(json.dumps(whole | rows).encode() + b"\n")
        return rows_bytes

    def read_scanning(number: int) -> Sample:
        with open(path, "rb") as file:
            return _parse(next(islice(file, number, None)))

    def read_indexed(number: int) -> Sample:
        with open(path, "rb") as file:
            file.seek(starts[number])
            return _parse(file.readline())

    return write, read_scanning, read_indexed


def _parse(line: bytes) -> Sample:
    record = json.loads(line)
    return Sample(
        np.array(record["tokens"], np.int32),
        np.array(record["loss_mask"], np.uint8),
        np.array(record["topk_token_ids"], np.int32),
        np.array(record["topk_logits"], np.float32),
        np.array(record["log_sum_exp_logits"], np.float32),
        0,
    )


def _joined(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Samples of 64 supervised tokens or more, as long answers have: short ones are joined."""
    parts: list[Sample] = []
    for sample in samples:
        parts.append(sample)
        if sum(len(part.topk_ids) for part in parts) >= NUM_SUPERVISED:
            *arrays, context_lengths = zip(*parts, strict=True)
            yield Sample(*map(np.concatenate, arrays), context_lengths[0])
            parts = []


def _synthetic(num_samples: int, vocab_size: int) -> Iterator[Sample]:
    """Samples with uniformly random ids, the worst case for a code of ids."""
    rng = np.random.default_rng(0)
    for _ in range(num_samples):
        ids = np.array([rng.choice(vocab_size, K, replace=False) for _ in range(NUM_SUPERVISED)])
        sharpness = rng.uniform(1, 3, (NUM_SUPERVISED, 1))
        logits = -sharpness * np.log(np.arange(1, 50_000))
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        tails = np.log(np.exp(log_probs[:, K:]).sum(axis=1))
        tokens = rng.integers(vocab_size, size=32 + NUM_SUPERVISED).astype(np.int32)
        mask = (np.arange(tokens.size) >= 32).astype(np.uint8)
        log_probs = log_probs[:, :K].astype(np.float32)
        yield Sample(tokens, mask, ids, log_probs, tails.astype(np.float32), 32)


def _top_k(sample: Sample) -> Sample:
    """The K most probable entries of each row; the rest joins the tail."""
    order = np.argsort(-sample.topk_log_probs, axis=1, kind="stable")
    ids = np.take_along_axis(sample.topk_ids, order, 1)
    log_probs = np.take_along_axis(sample.topk_log_probs, order, 1)
    outside = np.exp(log_probs[:, K:].astype(np.float64)).sum(axis=1)
    with np.errstate(divide="ignore"):
        tails = np.log(np.exp(sample.tail_log_probs.astype(np.float64)) + outside)
    return sample._replace(
        topk_ids=ids[:, :K], topk_log_probs=log_probs[:, :K], tail_log_probs=tails
    )


def _top_p(sample: Sample) -> Sample:
    """The fewest of the K most probable entries that hold 0.99 of the mass."""
    sample = _top_k(sample)
    mass = np.exp(sample.topk_log_probs.astype(np.float64))
    cut = mass.cumsum(axis=1) - mass >= 0.99
    rest = np.where(cut, mass, 0).sum(axis=1) + np.exp(sample.tail_log_probs)
    with np.errstate(divide="ignore"):
        return sample._replace(
            topk_ids=np.where(cut, -1, sample.topk_ids),
            topk_log_probs=np.where(cut, -np.inf, sample.topk_log_probs),
            tail_log_probs=np.log(rest),
        )


def _draw(sample: Sample, vocab_size: int, rng: np.random.Generator) -> Sample:
    """50 draws from each row. The tail's ids are not stored, so a draw from the tail is any id."""
    ids = np.full((len(sample.topk_ids), NUM_DRAWS), -1)
    log_probs = np.full(ids.shape, -np.inf, np.float32)
    for row, (kept, values) in enumerate(zip(sample.topk_ids, sample.topk_log_probs, strict=True)):
        mass = np.exp(values.astype(np.float64))
        weights = np.append(mass, max(0.0, 1 - mass.sum()))
        places = rng.choice(len(weights), NUM_DRAWS, p=weights / weights.sum())
        drawn = np.append(kept, -1)[places]
        drawn = np.where(drawn < 0, rng.integers(vocab_size, size=NUM_DRAWS), drawn)
        distinct, counts = np.unique(drawn, return_counts=True)
        ids[row, : distinct.size] = distinct
        log_probs[row, : distinct.size] = np.log(counts / NUM_DRAWS)
    tails = np.full(len(ids), -np.inf, np.float32)
    return sample._replace(topk_ids=ids, topk_log_probs=log_probs, tail_log_probs=tails)


if __name__ == "__main__":
    main()
