"""A large cache: opening it, reading it at random, and packing its samples into sequences.

    PYTHONPATH=tests python benchmarks/scale.py [--small]

Ten million tiny samples in 500 shards, as tests/test_cache_scale.py makes them, all in the file
system's memory. Packing takes a million lengths (log-normal, mean about 500 tokens) into sequences
of 4,096. Times are CPU times of this process.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from test_cache_scale import NUM_SHARDS, write_large

from nemo_kd.cache import TopKCache
from nemo_kd.student.packing import pack_samples

_NUM_READS = 5000
_PACK_SIZE = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="a tenth of the samples")
    tenth = 10 if parser.parse_args().small else 1
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "cache")
        write_large(path, 20_000 // tenth)
        opening = min(seconds(lambda: TopKCache.open(path)) for _ in range(5))
        cache = TopKCache.open(path)
        numbers = np.random.default_rng(0).integers(len(cache), size=_NUM_READS).tolist()
        apart = seconds(lambda: [cache[number] for number in numbers])
        shard = cache.manifest.samples_per_shard
        together = seconds(lambda: [cache[number % shard] for number in numbers])
    num_samples = 1_000_000 // tenth
    lengths = np.random.default_rng(0).lognormal(6, 0.7, num_samples).astype(int)
    lengths = lengths.clip(1, _PACK_SIZE)
    packs: list[list[int]] = []
    packing = seconds(lambda: packs.extend(pack_samples(lengths, _PACK_SIZE, seed=0)))
    fill = lengths.sum() / (len(packs) * _PACK_SIZE)
    print(f"{len(cache):,} samples in {NUM_SHARDS} shards: opened in {opening:.3f} s, ", end="")
    print(f"{1e6 * opening / NUM_SHARDS:.0f} microseconds a shard")
    print(f"random samples of one open shard: {1e3 * together / _NUM_READS:.3f} ms each")
    print(f"random samples of all shards, of which 16 stay open: {1e3 * apart / _NUM_READS:.3f} ms")
    print(f"{num_samples:,} samples packed in {packing:.1f} s, the sequences filled to {fill:.1%}")


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


if __name__ == "__main__":
    main()
