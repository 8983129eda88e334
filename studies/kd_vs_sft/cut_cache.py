"""Write a cache of a smaller K from a cache of a larger K. The values are rounded once more.

python studies/kd_vs_sft/cut_cache.py cache-500 cache-20 --k 20
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from nemo_kd.cache import CacheWriter, Sample, TopKCache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a cache of selection top_k")
    parser.add_argument("output", type=Path, help="the cache to write, codec packed")
    parser.add_argument("--k", type=int, required=True, help="entries to keep of each row")
    arguments = parser.parse_args()
    source = TopKCache.open(arguments.source)
    manifest = source.manifest
    if manifest.selection["kind"] != "top_k" or manifest.selection["k"] < arguments.k:
        parser.error(f"{arguments.source}: expected top_k of --k or more, got {manifest.selection}")
    selection = manifest.selection | {"k": arguments.k}
    smaller = replace(manifest, selection=selection, codec="packed")
    writer = CacheWriter.open(arguments.output, smaller)
    for shard in writer.claim_shards(wait=lambda: time.sleep(1)):
        with writer.shard(shard) as sink:
            for index in smaller.shard_samples(shard):
                sink.add(**cut(source[index], arguments.k)._asdict())


def cut(sample: Sample, k: int) -> Sample:
    """The k most probable entries of each row; the probability of the others joins the tail."""
    order = np.argsort(-sample.topk_log_probs, axis=1, kind="stable")
    ids = np.take_along_axis(sample.topk_ids, order, axis=1)
    log_probs = np.take_along_axis(sample.topk_log_probs, order, axis=1)
    tail = np.logaddexp(
        sample.tail_log_probs, np.logaddexp.reduce(log_probs[:, k:], axis=1, initial=-np.inf)
    )
    return sample._replace(
        topk_ids=ids[:, :k], topk_log_probs=log_probs[:, :k], tail_log_probs=tail
    )


if __name__ == "__main__":
    main()
