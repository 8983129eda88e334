"""Ten million samples open in a second, and a random one costs what one of ten thousand costs."""

import dataclasses
import os
import time
from pathlib import Path

import numpy as np
import pytest
from test_cache import make_manifest, make_sample

from nemo_kd.cache import CacheWriter, TopKCache
from nemo_kd.cache.manifest import record_bytes

NUM_SHARDS = 500


def write_large(path: Path, samples_per_shard: int) -> None:
    """One shard by the writer; the others are links to its files with a record of their own."""
    manifest = make_manifest(NUM_SHARDS * samples_per_shard, samples_per_shard)
    sample = make_sample(manifest, 0, 1, 1)._asdict()
    with CacheWriter.open(path, manifest).shard(0) as shard:
        for _ in range(samples_per_shard):
            shard.add(**sample)
    first = TopKCache(path).shard_record(0)
    for index in range(1, NUM_SHARDS):
        directory = path / f"shard-{index:05d}"
        directory.mkdir()
        for file in first.files:
            os.link(path / "shard-00000" / file.name, directory / file.name)
        record = record_bytes(dataclasses.replace(first, index=index))
        (directory / "shard.json").write_bytes(record)


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("scale")
    write_large(directory / "large", 20_000)
    write_large(directory / "small", 20)
    return directory / "large", directory / "small"


def seconds_a_read(cache: TopKCache, numbers: np.ndarray) -> float:
    start = time.process_time()
    for number in numbers.tolist():
        cache[number]
    return (time.process_time() - start) / len(numbers)


def test_ten_million_samples_open_in_a_second(caches):
    start = time.process_time()
    cache = TopKCache.open(caches[0])
    assert time.process_time() - start < 1
    assert len(cache) == 10_000_000
    assert cache[9_999_999].tokens.shape == (2,)


@pytest.mark.parametrize("num_shards", [1, NUM_SHARDS], ids=["one shard", "all shards"])
def test_a_random_read_costs_the_same(caches, num_shards):
    """Within a half: the least of ten rounds each, taken in turn."""
    large, small = (TopKCache.open(path) for path in caches)
    rng = np.random.default_rng(0)
    rounds = [
        tuple(
            seconds_a_read(cache, rng.integers(len(cache) * num_shards // NUM_SHARDS, size=300))
            for cache in (large, small)
        )
        for _ in range(10)
    ]
    large_seconds, small_seconds = map(min, zip(*rounds, strict=True))
    assert large_seconds < 1.5 * small_seconds


def test_reading_takes_no_memory(caches):
    """Nothing is kept of what was read: 3,000 samples later the process is as large as before."""
    cache = TopKCache.open(caches[0])

    def resident_bytes() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE")

    numbers = np.random.default_rng(0).integers(len(cache), size=3000)
    seconds_a_read(cache, numbers[:500])
    before = resident_bytes()
    seconds_a_read(cache, numbers)
    assert resident_bytes() - before < 2**21
