"""Opening ten million samples reads none, and a random one costs what one of ten thousand costs."""

import dataclasses
import os
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


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each read of a pair's file."""
    sizes: list[int] = []
    preadv = os.preadv

    def count(descriptor: int, buffers: list[bytearray], offset: int) -> int:
        sizes.append(sum(map(len, buffers)))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", count)
    return sizes


def test_opening_ten_million_samples_reads_none_of_them(caches, reads):
    cache = TopKCache.open(caches[0])
    assert len(cache) == 10_000_000
    assert reads == []
    assert cache[9_999_999].tokens.shape == (2,)


def test_a_random_read_costs_the_same(caches, reads):
    """As many reads of as many bytes in ten million samples as in ten thousand."""
    costs = []
    for path in caches:
        cache = TopKCache.open(path)
        for number in np.random.default_rng(0).integers(1, len(cache) - 1, size=300).tolist():
            reads.clear()
            cache[number]
            costs.append(tuple(reads))
    # The last sample of a shard has no next place to read: a second cost, 8 bytes a pair less.
    assert len(set(costs)) == 2


def test_reading_takes_no_memory(caches):
    """Nothing is kept of what was read: 3,000 samples later the process is as large as before."""
    cache = TopKCache.open(caches[0])

    def resident_bytes() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE")

    numbers = np.random.default_rng(0).integers(len(cache), size=3000)
    for number in numbers[:500].tolist():
        cache[number]
    before = resident_bytes()
    for number in numbers.tolist():
        cache[number]
    assert resident_bytes() - before < 2**21
